"""Collectives that are written out rather than left to GSPMD: what each device computes within a `shard_map`.

Axes are logical here, too; which axes of the mesh they lie on is in `parallel/sharding.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from imagegpt_jax.parallel import sharding

# The residual stream between branches: its columns are sharded like heads and mlp, so branches end in a reduce-scatter.
STREAM = ("batch", "length", "residual")


def _manual_axes(axis: str | None) -> tuple[str, ...]:
    """The manual axes (shard_map) of an activation's logical axis: a `shard_map` over them is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = sharding.ACTIVATION_RULES.get(axis or "", ())
    return tuple(n for n in names if kinds.get(n) == AxisType.Manual and mesh.shape[n] > 1)


def part_index(axis: str) -> jax.Array | int:
    """This device's index along the manual axes of a logical axis; 0 where there are none."""
    names = _manual_axes(axis)
    return jax.lax.axis_index(names) if names else 0


def on_first(x: jax.Array, axis: str | None) -> jax.Array:
    """x on the first of the devices that compute parts of a sum over a logical axis, and zero on the others."""
    names = _manual_axes(axis)
    return jnp.where(jax.lax.axis_index(names) == 0, x, 0) if names else x


def gather_rows(x: jax.Array, names: str | tuple[str, ...]) -> jax.Array:
    """The parts of all devices along mesh axes, one after another in the first dimension; gradients are scattered."""
    return (_gather_rows if sharding.platform() == "cpu" else _all_gather)(x, names)


def _all_gather(x: jax.Array, names: str | tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, names, tiled=True)


# On CPU the gradient is written out, for `scatter_rows`.
_gather_rows = jax.custom_vjp(_all_gather, nondiff_argnums=(1,))
_gather_rows.defvjp(
    lambda x, names: (_all_gather(x, names), None), lambda names, _, gradient: (scatter_rows(gradient, names),)
)


def scatter_rows(x: jax.Array, names: str | tuple[str, ...]) -> jax.Array:
    """The sum over the devices along mesh axes, of which each keeps its part of the first dimension."""
    if sharding.platform() != "cpu":
        return jax.lax.psum_scatter(x, names, tiled=True)
    # A reduce-scatter between processes now and then loses values there, from 128 KiB on (jax-ml/jax#40830).
    parts = jax.lax.all_to_all(x, names, 0, 0, tiled=True)
    return parts.reshape(jax.lax.axis_size(names), -1, *x.shape[1:]).sum(axis=0)


def gather_along(x: jax.Array, names: str | tuple[str, ...], dim: int) -> jax.Array:
    """`gather_rows` along any dimension."""
    # Parts side by side along a dimension of their own: a scatter along another than the first, as the gradient of
    # the gather would be, some compilers make an all-reduce, twice the bytes, and uneven parts are sent on by permutes.
    parts = jnp.moveaxis(gather_rows(x[None], names), 0, dim)
    return parts.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def gather_columns(x: jax.Array) -> jax.Array:
    """The whole last dimension of a stream that is laid out as `residual`, where that is written out.

    Like the three below it returns its argument as it is where the axes are auto
    (`parallel.sharding.constrain`).
    """
    names = _manual_axes("residual")
    return gather_along(x, names, x.ndim - 1) if names else x


def own_columns(x: jax.Array) -> jax.Array:
    """Undoes `gather_columns`."""
    names = _manual_axes("residual")
    if not names:
        return x
    size = x.shape[-1] // jax.lax.axis_size(names)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(names) * size, size, axis=x.ndim - 1)


def sum_parts(x: jax.Array) -> jax.Array:
    """The sum of what the devices that share the columns have each computed."""
    names = _manual_axes("residual")
    return jax.lax.psum(x, names) if names else x


def sum_to_own_columns(x: jax.Array) -> jax.Array:
    """`own_columns` of `sum_parts`, for half the communication."""
    names = _manual_axes("residual")
    if not names:
        return x
    parts = x.reshape(*x.shape[:-1], jax.lax.axis_size(names), -1)
    return scatter_rows(jnp.moveaxis(parts, -2, 0), names)[0]


def sum_vocabulary(x_TBMD: jax.Array) -> jax.Array:
    """The sum over a first dimension that is laid out as `vocab`, laid out as a stream between blocks.

    It is sent in the dtype of x, where `jnp.sum` would send bfloat16 as float32.
    """
    if x_TBMD.shape[0] == 1:
        return x_TBMD[0]
    if not sharding.divides_evenly(x_TBMD.shape[1:], STREAM):
        return jax.lax.reduce(x_TBMD, jnp.zeros((), x_TBMD.dtype), jax.lax.add, (0,))
    return map_shards(lambda x_TBMD: sum_to_own_columns(x_TBMD[0]), [("vocab", *STREAM[:2], None)], STREAM)(x_TBMD)


def map_shards(
    function: Callable[..., Any], in_axes: Sequence[Sequence[str | None]], out_axes: Sequence[str | None]
) -> Callable[..., Any]:
    """Runs a function on every device's part of its arguments, which are laid out by logical axes."""
    mesh = jax.sharding.get_abstract_mesh()
    names = sharding.auto_axes(mesh.axis_names, mesh)
    if mesh.empty or mesh.size == 1 or not names:
        return function
    specs = tuple(sharding.activation_spec(axes, mesh) for axes in in_axes)
    out = sharding.activation_spec(out_axes, mesh)
    return jax.shard_map(function, in_specs=specs, out_specs=out, axis_names=set(names), check_vma=False)


def map_rows(function: Callable[..., Any], cut: Sequence[bool]) -> Callable[..., Any]:
    """Runs a function on every device's rows, with the rest of its arguments whole; what it returns is rows, too.

    Each device runs the program it would run alone, to the same bits. `tensor` stays an auto axis.

    Args:
      function: of trees of arrays.
      cut: for each argument, whether the first dimension of its arrays is rows. Scalars are replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = () if mesh.empty else sharding.batch_axes(mesh)
    if not names or sharding.batch_shards(mesh) == 1:
        return function

    def specs(tree: Any, rows: bool) -> Any:
        return jax.tree.map(lambda x: P(names) if rows and x.ndim else P(), tree)

    def call(*args: Any) -> Any:
        inputs = tuple(specs(tree, rows) for tree, rows in zip(args, cut, strict=True))
        outputs = specs(jax.eval_shape(function, *args), True)
        mapped = jax.shard_map(function, in_specs=inputs, out_specs=outputs, axis_names=set(names), check_vma=False)
        return mapped(*args)

    return call
