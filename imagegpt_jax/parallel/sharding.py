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
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imagegpt_jax.errors import UserError

CONFIG_AXES = ("data", "fsdp", "tensor")
# `fsdp` of a config becomes two axes of the mesh, each along axes of a TPU's torus (see `parallel/fsdp.py`).
FSDP = ("fsdp", "fsdp_minor")
MESH_AXES = ("data", *FSDP, "tensor")

# Rows of a tile of a TPU's memory in bfloat16: the compiler fills up gradients of others when it scatters them.
TILE = 16
# Logical axis of a parameter -> mesh axes. An axis that is not here is not sharded. `fsdp` shards one of the
# dimensions that may be (`spec_for`).
RULES: dict[str, tuple[str, ...]] = {
    "embed": FSDP,
    "mlp": ("tensor", *FSDP),
    "heads": ("tensor", *FSDP),
    "kv_heads": ("tensor", *FSDP),
    "vocab": ("tensor", *FSDP),
    "codebook": ("tensor", *FSDP),
    "conv_in": FSDP,
    "conv_out": FSDP,  # where it divides better than `conv_in`
}
# Logical axis of an activation -> mesh axes. Its `embed`, for one, is whole on every device.
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", *FSDP),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "residual": ("tensor",),  # columns of the stream between blocks, which a backward pass finds saved
    "vocab": ("tensor",),
    "codes": ("tensor",),  # of the codebook in use: gathered over `fsdp`
}


def mesh_shape(shape: Mapping[str, int], count: int) -> dict[str, int]:
    """The sizes of a config's mesh such as `{"data": -1, "fsdp": 1, "tensor": 1}`; one -1 takes what is left.

    Raises UserError, with the two nearest meshes that fit, if they do not multiply to the number of devices.
    """
    sizes = [int(shape[a]) for a in CONFIG_AXES]
    text = " x ".join(f"{a}={s}" for a, s in zip(CONFIG_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {text} is not possible: sizes are positive, and one of them may be -1.")
    known = math.prod(s for s in sizes if s != -1)
    if count % known or (-1 not in sizes and known != count):
        legal = [(d, f, count // d // f) for d in _divisors(count) for f in _divisors(count // d)][::-1]
        given = [(axis, at, sizes[at]) for at, axis in enumerate(CONFIG_AXES) if sizes[at] != -1]
        # Sizes are as far apart as their ratio; of meshes as near as each other, first the one with the larger `data`.
        near = sorted(legal, key=lambda m: round(sum(abs(math.log(m[at] / s)) for _, at, s in given), 9))[:2]
        use = " or ".join(" ".join(f"mesh.{axis}={m[at]}" for axis, at, s in given if m[at] != s) for m in near)
        raise UserError(
            f"mesh {text} does not fit {count} devices: the sizes must multiply to {count} (-1 fills): use {use}."
        )
    return {a: count // known if s == -1 else s for a, s in zip(CONFIG_AXES, sizes, strict=True)}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def minor_sizes(fsdp: int) -> list[int]:
    """Sizes of the second axis when `fsdp` is split into two, the most even split first."""
    return [m for m in range(math.isqrt(fsdp), 0, -1) if fsdp % m == 0]


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the device mesh of a config. Over several TPU slices, `data` spans the slices.

    Raises UserError if the sizes do not multiply to the devices, or `data` not to a multiple of the slices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = mesh_shape(shape, len(devices))
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data={sizes['data']} does not divide over {slices} slices: `data` is the axis between slices, so it"
            f" must be a multiple of {slices}."
        )
    data, fsdp, tensor = (sizes[a] for a in CONFIG_AXES)
    # The most even split along whole axes of the torus, else the most even one. GPUs have no torus.
    minors = minor_sizes(fsdp) if devices[0].platform != "gpu" else [1]
    for minor, split in [(m, False) for m in minors] + [(minors[0], True)]:
        inner = (data // slices, fsdp // minor, minor, tensor)
        try:
            if slices > 1:
                grid = mesh_utils.create_hybrid_device_mesh(
                    inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=split
                )
            else:
                grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=split)
        except NotImplementedError:  # axes of the torus do not multiply to these sizes
            continue
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    raise UserError(f"no mesh of {sizes} can be laid over these {len(devices)} devices: try other sizes.")


def local_mesh(devices: Sequence[Any] | None = None, tensor: int = 1) -> Mesh:
    """The mesh of inference: data parallel over devices of this process (all by default), with or without `tensor`."""
    return make_mesh({"data": -1, "fsdp": 1, "tensor": tensor}, jax.local_devices() if devices is None else devices)


def batch_axes(mesh: Any) -> tuple[str, ...]:
    """The auto axes (GSPMD) of the mesh that shard a batch."""
    return auto_axes(ACTIVATION_RULES["batch"], mesh)


def residual_axes(mesh: Any) -> tuple[str, ...]:
    """The auto axes (GSPMD) of more than one device that shard the columns of the residual stream."""
    return tuple(n for n in auto_axes(ACTIVATION_RULES["residual"], mesh) if mesh.shape[n] > 1)


def batch_shards(mesh: Any) -> int:
    """The number of shards of a batch."""
    return _parts(ACTIVATION_RULES["batch"], mesh)


def shards_parameters(mesh: Any) -> bool:
    """Whether parameters are sharded over `fsdp`."""
    return _parts(FSDP, mesh) > 1


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1, key: str = "batch_size") -> None:
    """Raises UserError if a batch is not divisible by the mesh times `accumulate` micro-batches."""
    parts = batch_shards(mesh) * accumulate
    for name, value in ((key, batch_size), ("accumulate", accumulate)):
        if value < 1:
            raise UserError(f"{name}={value} is not possible: use 1 or more.")
    if batch_size % parts:
        near = sorted({max(1, batch_size // parts) * parts, (batch_size // parts + 1) * parts})
        fewer = [n for n in _divisors(mesh.size) if n < batch_shards(mesh) and batch_size % (n * accumulate) == 0]
        what = f"data x fsdp = {batch_shards(mesh)} devices" + (f" x accumulate={accumulate}" if accumulate > 1 else "")
        raise UserError(
            f"{key}={batch_size} does not divide over {what}: use {' or '.join(map(str, near))}"
            + (f", or data x fsdp = {fewer[-1]} devices." if batch_size < batch_shards(mesh) and fewer else ".")
        )


def check_divides(sizes: Mapping[str, int], axis: str, mesh: Any) -> None:
    """Checks that sizes (config key -> number of heads, columns, ...) divide over an axis, "fsdp" or "tensor".

    Raises UserError for the first that does not; it names sizes of that axis that all of them and the devices divide
    by, with `data` taking what is left.
    """
    parts = _parts(FSDP if axis == "fsdp" else (axis,), mesh)
    for key, size in sizes.items():
        if size % parts:
            legal = _divisors(math.gcd(parts * _parts("data", mesh), *sizes.values()))
            below, above = [n for n in legal if n < parts][-2:], [n for n in legal if n > parts][:2]
            raise UserError(
                f"{key}={size} does not divide over mesh.{axis}={parts}: use mesh.{axis}="
                f"{' or '.join(map(str, below + above))}, or a {key} that is a multiple of {parts}."
            )


def as_tuple(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """An entry of a PartitionSpec as a tuple of mesh axes."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _parts(entry: str | tuple[str, ...] | None, mesh: Any) -> int:
    return math.prod(mesh.shape.get(n, 1) for n in as_tuple(entry))


def auto_axes(names: Sequence[str], mesh: Any) -> tuple[str, ...]:
    """Those of some mesh axes that are auto (GSPMD's): within a `shard_map` over them there are none."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(n for n in names if kinds.get(n) == AxisType.Auto)


def spec_for(shape: Sequence[int], axes: Sequence[str | None] | None, mesh: Any) -> P:
    """The PartitionSpec of a parameter with logical `axes` (without the stacked layers' axis).

    A mesh axis that does not divide the dimension its rule names is left out there. Of dimensions that `fsdp` may
    shard, it shards the one that divides best, into whole tiles if there is one, of equal ones one that `tensor` does
    not shard, and of those the first; parts of `fsdp` that are left over go to the largest dimension that they divide.
    """
    axes = tuple(axes or ())
    spec: list[tuple[str, ...]] = [()] * len(shape)
    first = len(shape) - len(axes)
    rest = list(shape)  # of each dimension, what a device holds
    named = {dim: RULES.get(axis or "", ()) for dim, axis in enumerate(axes, first)}

    def cut(dim: int, name: str) -> bool:
        parts = mesh.shape.get(name, 1)
        if parts == 1 or rest[dim] % parts or any(name in entry for entry in spec):
            return False
        spec[dim], rest[dim] = (*spec[dim], name), rest[dim] // parts
        return True

    def fit(dim: int) -> tuple[int, int]:
        """How many axes of `fsdp` divide what is left of a dimension, and after how many it is still of whole tiles."""
        size, divide, whole = rest[dim], 0, 0
        for parts in (mesh.shape.get(name, 1) for name in FSDP):
            if size % parts == 0:
                size, divide = size // parts, divide + 1
                whole += size % TILE == 0
        return divide, whole

    for dim, names in named.items():
        if "tensor" in names:
            cut(dim, "tensor")
    ours = [dim for dim, names in named.items() if set(FSDP) & set(names)]
    ours.sort(key=lambda dim: (fit(dim), not spec[dim]), reverse=True)
    for name in FSDP if ours else ():
        any(cut(dim, name) for dim in (*ours, *sorted(named, key=lambda dim: -rest[dim])))
    return P(*(entry if len(entry) > 1 else entry[0] if entry else None for entry in spec))


def module_specs(abstract_module: nnx.Module, mesh: Mesh) -> Any:
    """PartitionSpecs of all parameters of an abstract module, as a tree like its pure dict."""
    state = nnx.state(abstract_module)
    specs = jax.tree.map(
        lambda v: spec_for(v.shape, getattr(v, "axes", None), mesh),
        state,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    return nnx.to_pure_dict(specs)


def tensor_shardings(abstract_module: Any, mesh: Mesh) -> Any:
    """Layout of an abstract module's parameters for decoding: sharded over the `tensor` axis alone, else replicated."""
    leaves, treedef = jax.tree.flatten(abstract_module)
    variables = jax.tree.leaves(abstract_module, is_leaf=lambda v: isinstance(v, nnx.Variable))
    layouts = []
    for leaf, variable in zip(leaves, variables, strict=True):
        spec = spec_for(leaf.shape, getattr(variable, "axes", None), mesh)
        only = (tuple(n for n in as_tuple(entry) if n not in FSDP) or None for entry in spec)
        layouts.append(NamedSharding(mesh, P(*only)))
    return jax.tree.unflatten(treedef, layouts)


# A leaf of optimizer state without a parameter's shape is sharded over `fsdp` if it has more elements than this.
LARGE = 1 << 18


def tree_specs(tree: Any, params: Any, param_specs: Any, mesh: Any) -> Any:
    """Specs for a state tree (optimizer, EMA, ...): a leaf whose path ends in a parameter's path is laid out like it.

    A leaf with some of the parameter's dimensions, such as a factored second moment, is sharded along those; a large
    one that `fsdp` does not shard there, or that is like no parameter, such as a preconditioner, along its last one.
    """
    specs = jax.tree.leaves(param_specs, is_leaf=lambda x: isinstance(x, P))
    by_path = {
        tuple(map(str, path)): (leaf.shape, spec)
        for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs, strict=True)
    }

    def find(path: Any, leaf: Any) -> P:
        names = tuple(map(str, path))
        for start in range(len(names)):
            if names[start:] in by_path:
                whole, spec = by_path[names[start:]]
                kept = _subset(leaf.shape, whole, spec)
                cut = {name for entry in kept for name in as_tuple(entry)}
                if leaf.shape == whole or leaf.size <= LARGE or cut & set(FSDP):
                    return kept
                return spec_for(leaf.shape, ("mlp" if "tensor" in cut else "embed",), mesh)
        return spec_for(leaf.shape, ("embed",), mesh) if leaf.size > LARGE else P()

    return jax.tree_util.tree_map_with_path(find, tree)


def _subset(shape: Sequence[int], whole: Sequence[int], spec: P) -> P:
    """The spec of an array whose dimensions are some of those of `whole`, in order; else of a replicated one."""
    entries, dims = [], iter(zip(whole, spec, strict=True))
    for size in shape:
        entry = next((e for s, e in dims if s == size), ...)
        if entry is ...:
            return P()
        entries.append(entry)
    return P(*entries)


def platform() -> str:
    """The platform that is compiled for: that of the mesh in force, which ahead of time need not be this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def activation_spec(axes: Sequence[str | None], mesh: Any) -> P:
    """The PartitionSpec of an activation with logical `axes`, over auto axes alone."""
    return P(*(auto_axes(ACTIVATION_RULES.get(a or "", ()), mesh) or None for a in axes))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Lays an activation out by logical axes under the mesh in force (`jax.set_mesh`); without one it is a no-op."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not auto_axes(mesh.axis_names, mesh):
        return x
    spec = [
        e if size % _parts(e, mesh) == 0 else None for size, e in zip(x.shape, activation_spec(axes, mesh), strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, P(*spec))


def divides_evenly(shape: Sequence[int], axes: Sequence[str | None]) -> bool:
    """Whether the auto axes of the mesh in force divide an activation with logical `axes` evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(size % _parts(e, mesh) == 0 for size, e in zip(shape, activation_spec(axes, mesh), strict=True))


def axis_parts(axis: str) -> int:
    """The number of shards of a logical axis of activations on the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _parts(ACTIVATION_RULES[axis], mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: rows over `data` x `fsdp`."""
    return NamedSharding(mesh, P(ACTIVATION_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, P())


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The global rows that this process loads, ascending: those that its devices hold, neighbours or not."""
    index = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[i[0]] for i in index.values() if i is not None]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays (the rows of `host_rows`) -> global arrays sharded over the batch. Arrays of text stay behind."""
    parts, layout = batch_shards(mesh), batch_sharding(mesh)
    held = len(host_rows(mesh, parts))  # of `parts` parts, how many are here

    def put(local: np.ndarray) -> jax.Array:
        size = local.shape[0] // held * parts
        rows = host_rows(mesh, size)
        kind = jax.dtypes.canonicalize_dtype(local.dtype)  # 64 bits only where JAX has them

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = np.searchsorted(rows, start)
            return local[first : first + stop - start].astype(kind, copy=False)

        return jax.make_array_from_callback((size, *local.shape[1:]), layout, part, dtype=kind)

    return {k: put(v) for k, v in batch.items() if v.dtype.kind in "biuf"}


def put_whole(tree: Any, layout: Any) -> Any:
    """Arrays that this process, like every other, holds whole -> global arrays laid out by a tree of shardings.

    Each device is given its part and nothing travels, where `jax.device_put` would refuse what is on a device already,
    and send all else through every device to compare it.
    """

    def put(x: Any, kind: NamedSharding) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, kind, lambda index: host[index], dtype=host.dtype)

    return jax.tree.map(put, tree, layout)
