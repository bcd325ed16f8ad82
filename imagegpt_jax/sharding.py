"""Meshes and logical axes: the only place where the names of mesh axes appear.

Mesh axes: `data` (pure data parallel, may cross slices), `fsdp` (parameters, gradients and optimizer state sharded, and
the batch with them), `tensor` (heads, mlp, vocab, codebook). Models name *logical* axes; `RULES` maps them here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imagegpt_jax.cli import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. An axis that is not here is not sharded.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "codebook": ("tensor", "fsdp"),
    "codes": "tensor",  # of the codebook in use: gathered over `fsdp`
    "conv_in": "fsdp",
    "conv_out": "fsdp",  # where `conv_in` does not divide
}
# Of activations only these are sharded: `embed` of an activation is whole on every device.
ACTIVATION_AXES = ("batch", "mlp", "heads", "kv_heads", "vocab", "codes")


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the device mesh of a config such as `{"data": -1, "fsdp": 1, "tensor": 1}`; one -1 takes what is left.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = [int(shape[a]) for a in MESH_AXES]
    text = " x ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {text} is not possible: sizes are positive, and one of them may be -1.")
    known = math.prod(s for s in sizes if s != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise UserError(
            f"mesh {text} does not fit {len(devices)} devices: the sizes must multiply to {len(devices)}"
            " (config.mesh.data=-1 fills)."
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError if a batch cannot be cut evenly over the mesh."""
    parts = batch_shards(mesh)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not possible: use 1 or more.")
    if batch_size % parts:
        near = sorted({max(1, batch_size // parts) * parts, (batch_size // parts + 1) * parts})
        raise UserError(
            f"batch_size={batch_size} does not divide over data x fsdp = {parts} devices:"
            f" use {' or '.join(map(str, near))}."
        )


def spec_for(shape: Sequence[int], axes: Sequence[str | None] | None, mesh: Mesh) -> P:
    """The PartitionSpec of a parameter with logical `axes`; a dimension that does not divide stays whole."""
    axes = tuple(axes or ())
    axes = ("layers",) * (len(shape) - len(axes)) + axes if axes else (None,) * len(shape)
    taken: set[str] = set()
    spec: list[Any] = []
    for size, axis in zip(shape, axes, strict=True):
        names = RULES.get(axis or "", ())
        names = (names,) if isinstance(names, str) else names
        free = [n for n in names if n not in taken and mesh.shape[n] > 1]
        if free and size % math.prod(mesh.shape[n] for n in free) == 0:
            taken.update(free)
            spec.append(tuple(free) if len(free) > 1 else free[0])
        else:
            spec.append(None)
    return P(*spec)


def module_specs(abstract_module: nnx.Module, mesh: Mesh) -> Any:
    """PartitionSpecs of all parameters of an abstract module, as a tree like its pure dict."""
    state = nnx.state(abstract_module)
    specs = jax.tree.map(
        lambda v: spec_for(v.shape, getattr(v, "axes", None), mesh),
        state,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    return nnx.to_pure_dict(specs)


def tree_specs(tree: Any, param_specs: Any) -> Any:
    """Specs for a state tree (optimizer, EMA, ...): a leaf whose path ends in a parameter's path is laid out like it.

    Args:
      tree: abstract tree, such as an optimizer state.
      param_specs: tree of PartitionSpecs of the parameters.
    """
    by_path = {
        tuple(map(str, path)): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(param_specs, is_leaf=lambda x: isinstance(x, P))
    }

    def find(path: Any, leaf: Any) -> P:
        names = tuple(map(str, path))
        for start in range(len(names)):
            spec = by_path.get(names[start:])
            if spec is not None and len(spec) == len(leaf.shape):
                return spec
        return P()

    return jax.tree_util.tree_map_with_path(find, tree)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Lays an activation out by logical axes under the mesh in force (`jax.set_mesh`); without one it is a no-op."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = []
    for size, axis in zip(x.shape, axes, strict=True):
        names = RULES.get(axis, ()) if axis in ACTIVATION_AXES else ()
        names = (names,) if isinstance(names, str) else names
        spec.append(names if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*spec))


def _parts(names: str | tuple[str, ...] | None, mesh: Any) -> int:
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh.shape[n] for n in names)


def axis_parts(axis: str) -> int:
    """Into how many parts the mesh in force cuts a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _parts(RULES[axis], mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: rows over `data` x `fsdp`."""
    return NamedSharding(mesh, P(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, P())


def host_rows(mesh: Mesh, batch_size: int) -> slice:
    """The global rows that this process loads: those that its addressable devices hold."""
    index = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    starts = [i[0].start or 0 for i in index.values() if i is not None]
    stops = [i[0].stop or batch_size for i in index.values() if i is not None]
    return slice(min(starts), max(stops))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays (this process's rows) -> global arrays sharded over the batch axis. Arrays of text stay behind."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items() if v.dtype.kind in "biuf"}
