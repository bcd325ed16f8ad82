"""Fully sharded data parallelism written out: modules gather their parameters just before use, and scatter gradients.

Arrays are what automatic partitioning would make them (ZeRO stage 3, arXiv:1910.02054). But left to itself the TPU
compiler sums gradients over a whole slice by all-reduce, twice the bytes of a reduce-scatter, and on some chips gathers
parameters by all-reduce as well. Asked for one axis of the torus at a time, it emits the collectives that are meant.

`tensor` stays an auto axis, except in blocks: there it would fetch the operand of each product by itself, where
one gather of the stream serves all matrices that read it (Megatron-LM's sequence parallelism, arXiv:2205.05198, but
along columns).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from imagegpt_jax.parallel import manual_collectives, sharding

Gather = Callable[[Any], Any]
# Name of gathered parameters for checkpoint policies: no policy should save them.
GATHERED = "gathered_parameter"


def keep(block: Any) -> Any:
    """The `gather` of parameters that are whole."""
    return block


def run(
    function: Callable[[Any, Any, Any, Gather], jax.Array],
    x: jax.Array,
    blocks: Any,
    batch: Any,
    dtype: Any,
    *,
    columns: bool = False,
    whole_columns: bool = False,
) -> Any:
    """Calls `function(x, blocks, batch, gather)` on every device's rows and parts of parameters.

    Args:
      function: gets the rows that a device holds, and must pass each single block through `gather` before use.
      x: array of B rows; so is the result.
      blocks: module, of stacked blocks or single, whose parameters carry logical `axes`.
      batch: tree of arrays of B rows.
      dtype: that of the computation; matrices are gathered, and their gradients scattered, in it.
      columns: whether the last dimension of x, and of the result, is laid out as `residual`, and `function` computes
        with parts of parameters over `tensor` (`parallel.manual_collectives.gather_columns` and those after it).
      whole_columns: whether the last dimension of x is laid out as `residual`, and `function` reads it whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = sharding.batch_axes(mesh)
    residual = sharding.residual_axes(mesh) if columns else ()
    if not names or not (sharding.shards_parameters(mesh) or residual) or x.shape[0] % sharding.batch_shards(mesh):
        return function(x, blocks, batch, keep)
    leaves, treedef = jax.tree.flatten(blocks)
    variables = jax.tree.leaves(blocks, is_leaf=lambda v: isinstance(v, nnx.Variable))
    specs = [sharding.spec_for(v.shape, v.axes, mesh) for v in variables]
    shared = () if columns else sharding.residual_axes(mesh)  # axes that stay auto
    # Cast before the loop over blocks, so that gradients leave it in the same dtype: half the bytes for `data` to sum.
    # Not on CPU, where XLA aborts at a sum of bfloat16 over some of the mesh's axes.
    if sharding.platform() == "cpu":
        dtype = jnp.promote_types(dtype, jnp.float32)
    leaves = [x.astype(dtype) if len(v.axes) >= 2 else x for x, v in zip(leaves, variables, strict=True)]

    def gather(block: Any) -> Any:
        parts, structure = jax.tree.flatten(block)
        return jax.tree.unflatten(structure, [whole(x, spec) for x, spec in zip(parts, specs, strict=True)])

    def whole(x: jax.Array, spec: P) -> jax.Array:
        spec = P(*tuple(spec)[len(spec) - x.ndim :])
        cut, kept = _only(spec, names), _only(spec, shared)
        apply = functools.partial(_whole, spec=cut)
        if any(kept) and not any(a and b for a, b in zip(cut, kept, strict=True)):
            # Left to itself the compiler gathers what it keeps in parts before it gathers the rest, and gradients, too.
            apply = jax.shard_map(apply, in_specs=kept, out_specs=kept, axis_names=set(shared), check_vma=False)
        return apply(x)

    def local(x: jax.Array, leaves: list[jax.Array], batch: Any) -> jax.Array:
        if shared and whole_columns:
            x = _whole_columns(x)  # once, and not wherever `function` reads them in a loop
        return function(x, jax.tree.unflatten(treedef, leaves), batch, gather)

    rows, stream = P(names), P(names, *(None,) * (x.ndim - 2), residual) if residual else P(names)
    held = [_only(spec, (*names, *residual)) for spec in specs]
    # Axes of one device are manual too: kernels that GSPMD cannot shard ask for that.
    manual = {*names, *residual, *(name for name, size in mesh.shape.items() if size == 1)}
    return jax.shard_map(local, in_specs=(stream, held, rows), out_specs=stream, axis_names=manual, check_vma=False)(
        x, leaves, batch
    )


def apply(function: Callable[[Any, jax.Array], jax.Array], module: Any, x: jax.Array) -> jax.Array:
    """`function(module, x)` on every device's rows of x, for a layer that computes in the dtype of x."""

    def on_rows(x: jax.Array, module: Any, batch: None, gather: Gather) -> jax.Array:
        return function(gather(module), x)

    return run(on_rows, x, module, None, x.dtype)


@jax.custom_vjp
def _whole_columns(x: jax.Array) -> jax.Array:
    """Gathers the columns of a stream; those of its gradient stay in parts."""
    return sharding.constrain(x, (None,) * x.ndim)


def _whole_columns_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (sharding.constrain(gradient, (*(None,) * (gradient.ndim - 1), "residual")),)


_whole_columns.defvjp(lambda x: (_whole_columns(x), None), _whole_columns_backward)


def _only(spec: P, names: tuple[str, ...]) -> P:
    """The part of a PartitionSpec about some mesh axes."""
    return P(*(tuple(n for n in sharding.as_tuple(entry) if n in names) or None for entry in spec))


def _whole(x: jax.Array, spec: P) -> jax.Array:
    """Gathers one parameter of a block, axis by axis."""
    for dim, entry in enumerate(spec):
        for name in reversed(sharding.as_tuple(entry)):
            x = manual_collectives.gather_along(x, name, dim)
    return checkpoint_name(x, GATHERED)
