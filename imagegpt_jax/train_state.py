"""TrainState: everything a run is, as one pytree; made already sharded. The only home of nnx.split and nnx.merge.

A *network* is a named NNX module ("generator", "discriminator", "decoder", ...). Outside its forward pass it is a pure
dict of arrays, so that jit, grad and Orbax see plain pytrees. Parameters that match a `frozen` pattern are held apart:
they get no gradients, moments or EMA.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imagegpt_jax.errors import UserError
from imagegpt_jax.parallel import sharding

Params = dict[Any, Any]
MIB = 1 << 20
Constructor = Callable[[jax.Array], nnx.Module]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run is: saved whole in a checkpoint.

    Attributes:
      step: int32 scalar, optimizer steps done.
      trainable: network -> parameters with gradients.
      frozen: network -> parameters without (paths left out of `trainable`).
      opt: network -> optimizer state.
      ema: network -> moving average of `trainable`, for the networks that keep one.
      stats: what a forward pass carries from step to step and is not trained, such as codebook use.
      guard: what is known of steps that went wrong, see `training/step_guard.py`; empty where nothing is trained.
    """

    step: jax.Array
    trainable: dict[str, Params]
    frozen: dict[str, Params]
    opt: dict[str, Any]
    ema: dict[str, Params]
    stats: dict[str, Any]
    guard: dict[str, Any] = dataclasses.field(default_factory=dict)

    def params(self, network: str) -> Params:
        """All parameters of a network, trained and frozen."""
        return join(self.trainable[network], self.frozen[network])

    def eval_params(self, network: str) -> Params:
        """Parameters to evaluate and sample with: the moving average where there is one."""
        return join(self.ema.get(network, self.trainable[network]), self.frozen[network])


@dataclasses.dataclass(frozen=True)
class Network:
    """The static part of a network: its structure, logical axes and shapes, without any array."""

    graphdef: Any
    abstract: nnx.Module
    axes: Params
    construct: Constructor

    def module(self, params: Params) -> nnx.Module:
        """The module with these parameters; call it inside jit, where it costs only tracing."""
        return merge(self.graphdef, params)


def split(module: nnx.Module) -> tuple[Any, Params]:
    """Module -> (graph definition, pure dict of its parameters)."""
    graphdef, variables = nnx.split(module)
    return graphdef, nnx.to_pure_dict(variables)


def merge(graphdef: Any, params: Params) -> Any:
    """(graph definition, pure dict of parameters) -> module."""
    return nnx.merge(graphdef, nnx.State(params))


def abstract(make: Callable[..., Any], *args: Any) -> Any:
    """The shapes of what `make(*args, key)` would give, such as a state of `task.init_state` and a setup."""
    return jax.eval_shape(functools.partial(make, *args), jax.eval_shape(jax.random.key, 0))


def network(construct: Constructor) -> Network:
    """Describes a network without allocating anything: `construct(key)` is only traced."""
    made = abstract(construct)
    graphdef, variables = nnx.split(made)
    axes = jax.tree.map(
        lambda v: tuple(getattr(v, "axes", None) or (None,) * len(v.shape)),
        variables,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    return Network(graphdef, made, nnx.to_pure_dict(axes), construct)


def count_params(params: Any) -> int:
    """Number of scalars in a tree of arrays (or abstract arrays)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def held_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of (abstract) arrays that carry their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def with_shardings(tree: Any, layout: Any) -> Any:
    """An abstract tree that carries its shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)


def partition(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """Splits a pure dict into (trainable, frozen): frozen are paths ("blocks/attention/query") that match a pattern.

    Raises:
      UserError: for a pattern that is no regular expression.
    """
    compiled = [_compile(p) for p in patterns]

    def walk(tree: Params, path: tuple[str, ...]) -> tuple[Params, Params]:
        kept: Params = {}
        held: Params = {}
        for key, value in tree.items():
            here = (*path, str(key))
            if isinstance(value, Mapping):
                a, b = walk(dict(value), here)
                if a:
                    kept[key] = a
                if b:
                    held[key] = b
            elif any(p.search("/".join(here)) for p in compiled):
                held[key] = value
            else:
                kept[key] = value
        return kept, held

    return walk(params, ())


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UserError(
            f"config.frozen has {pattern!r}, which is no regular expression ({e}): write a part of a parameter's path,"
            " such as decoder/conv_out, or ^encoder/ for all that begins so."
        ) from e


def join(a: Params, b: Params) -> Params:
    """Inverse of `partition`."""
    if not b:
        return a
    out = dict(a)
    for key, value in b.items():
        out[key] = join(out[key], dict(value)) if isinstance(value, Mapping) and key in out else value
    return out


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """{"a": {0: x}} -> {"a/0": x}."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        here = f"{prefix}{key}"
        flat.update(flatten(dict(value), f"{here}/") if isinstance(value, Mapping) else {here: value})
    return flat


def unflatten(flat: Mapping[str, Any], like: Params, prefix: str = "") -> Params:
    """Inverse of `flatten` for the paths that `flat` has, with the keys of `like`."""
    params: Params = {}
    for key, value in like.items():
        here = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if inner := unflatten(flat, dict(value), f"{here}/"):
                params[key] = inner
        elif here in flat:
            params[key] = flat[here]
    return params


def init_guard(phases: Sequence[str]) -> dict[str, dict[str, jax.Array]]:
    """The first state of the guard (`training/step_guard.py`): by phase, since a loss of another phase is another loss.

    Of each: `mean` and `variance` of the loss, of `count` good steps; `skipped` steps in all; `in_a_row` bad ones at
    the moment, of which `first` was the first (its number, counted from 0); `newest`, the last bad step; `tripped`,
    the first of the row that tripped the guard. Step numbers are -1 where there is none.
    """
    numbers = {"mean": 0.0, "variance": 0.0}
    counts = {"count": 0, "skipped": 0, "in_a_row": 0, "first": -1, "newest": -1, "tripped": -1}
    return {
        phase: {
            **{name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()},
            **{name: jnp.asarray(value, jnp.int32) for name, value in counts.items()},
        }
        for phase in phases
    }


def init(
    networks: Mapping[str, Network],
    optimizers: Mapping[str, optax.GradientTransformation],
    stats: Mapping[str, Any],
    key: jax.Array,
    *,
    frozen: Sequence[str] = (),
    frozen_networks: Sequence[str] = (),
    ema: Sequence[str] = (),
    phases: Sequence[str] = (),
) -> TrainState:
    """Builds the first TrainState; a pure function, to be run under `init_sharded` or `jax.eval_shape`.

    Args:
      networks: name -> network.
      optimizers: name -> optimizer, for the networks that are trained.
      stats: see `TrainState.stats`.
      key: PRNG key.
      frozen: patterns of parameter paths that are not trained.
      frozen_networks: networks of which nothing is trained.
      ema: networks that keep a moving average.
      phases: of the training, each of which is guarded by itself.
    """
    trainable: dict[str, Params] = {}
    held: dict[str, Params] = {}
    for i, (name, net) in enumerate(sorted(networks.items())):
        _, params = split(net.construct(jax.random.fold_in(key, i)))
        trainable[name], held[name] = partition(params, [".*"] if name in frozen_networks else frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=held,
        opt={name: optimizers[name].init(trainable[name]) for name in sorted(optimizers)},
        # A copy: the step donates the state, and a buffer cannot be donated twice.
        ema={name: jax.tree.map(jnp.copy, trainable[name]) for name in ema},
        stats=dict(stats),
        guard=init_guard(phases),
    )


def shardings(state: TrainState, networks: Mapping[str, Network], mesh: Mesh) -> TrainState:
    """NamedShardings of every leaf of an (abstract) state."""
    specs = {name: sharding.module_specs(net.abstract, mesh) for name, net in networks.items()}
    tree = dataclasses.replace(
        state,
        step=P(),
        **{
            field: {
                name: sharding.tree_specs(
                    value, nnx.to_pure_dict(nnx.state(networks[name].abstract)), specs[name], mesh
                )
                for name, value in getattr(state, field).items()
            }
            for field in ("trainable", "frozen", "opt", "ema")
        },
        stats=jax.tree.map(lambda _: P(), state.stats),
        guard=jax.tree.map(lambda _: P(), state.guard),
    )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree, is_leaf=lambda x: isinstance(x, P))


def check_layout(networks: Mapping[str, Network], mesh: Mesh) -> None:
    """Checks that every parameter of more than 1 MiB is cut into as many parts as `fsdp` has.

    Raises:
      UserError: for the first that is not; it names the largest part of `fsdp` that cuts them all.
    """
    if whole := _not_cut(networks, mesh):
        name, key, shape = whole
        parts, tensor = mesh.shape["fsdp"] * mesh.shape["fsdp_minor"], mesh.shape["tensor"]

        def works(fsdp: int) -> bool:
            """Whether a size would do as one axis, which then does however `make_mesh` cuts it into two."""
            return not _not_cut(networks, AbstractMesh((1, fsdp, 1, tensor), sharding.MESH_AXES))

        largest = next(n for n in range(parts - 1, 0, -1) if parts % n == 0 and works(n))
        raise UserError(
            f"{key} of the {name}, of shape {shape}, does not divide over mesh.fsdp={parts}: use"
            f" mesh.fsdp={largest} and put the rest of the devices into mesh.data."
        )


def _not_cut(networks: Mapping[str, Network], mesh: Any) -> tuple[str, str, tuple[int, ...]] | None:
    """Network, path and shape of the first parameter of more than 1 MiB not cut into as many parts as `fsdp` has."""
    parts = mesh.shape["fsdp"] * mesh.shape["fsdp_minor"]
    for name, net in networks.items():
        specs = sharding.module_specs(net.abstract, mesh)
        params = nnx.to_pure_dict(nnx.state(net.abstract))
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
            strict=True,
        )
        for (path, leaf), spec in pairs:
            held = NamedSharding(mesh, spec).shard_shape(leaf.shape)
            if leaf.size * leaf.dtype.itemsize > MIB and math.prod(leaf.shape) < math.prod(held) * parts:
                return name, "/".join(str(getattr(p, "key", p)) for p in path), leaf.shape
    return None


def init_sharded(
    make: Callable[[jax.Array], TrainState], networks: Mapping[str, Network], mesh: Mesh, seed: int
) -> tuple[TrainState, TrainState]:
    """Runs `make(key)` so that every leaf is born on the devices that keep it: no device holds a full copy.

    Returns:
      (state, shardings)
    """
    key = jax.random.key(seed)
    layout = shardings(jax.eval_shape(make, key), networks, mesh)
    return jax.jit(make, out_shardings=layout)(key), layout
