"""Fully sharded data parallelism written out: modules gather their parameters just before use, and scatter gradients.

Arrays are what automatic partitioning would make them (ZeRO stage 3, arXiv:1910.02054). But left to itself the TPU
compiler sums gradients over a whole slice by all-reduce, twice the bytes of a reduce-scatter, and on some chips gathers
parameters by all-reduce as well. Asked for one axis of the torus at a time, it emits the collectives that are meant.
Mesh axes other than those of the batch (`tensor`) stay with the compiler.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from imagegpt_jax import sharding

Gather = Callable[[Any], Any]
# Name of gathered parameters for checkpoint policies: no policy should save them.
GATHERED = "gathered_parameter"


def keep(block: Any) -> Any:
    """The `gather` of parameters that are whole."""
    return block


def run(
    function: Callable[[Any, Any, Any, Gather], jax.Array], x: jax.Array, blocks: Any, batch: Any, dtype: Any
) -> Any:
    """Calls `function(x, blocks, batch, gather)` on every device's rows and parts of parameters.

    Args:
      function: gets the rows that a device holds, and must pass each single block through `gather` before use.
      x: array of B rows; so is the result.
      blocks: module, of stacked blocks or single, whose parameters carry logical `axes`.
      batch: tree of arrays of B rows.
      dtype: that of the computation; matrices are gathered, and their gradients scattered, in it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = sharding.batch_axes(mesh)
    if not names or not sharding.cuts_parameters(mesh) or x.shape[0] % sharding.batch_shards(mesh):
        return function(x, blocks, batch, keep)
    leaves, treedef = jax.tree.flatten(blocks)
    variables = jax.tree.leaves(blocks, is_leaf=lambda v: isinstance(v, nnx.Variable))
    specs = [_only(sharding.spec_for(v.shape, v.axes, mesh), names) for v in variables]
    # Cast before the loop over blocks, so that gradients leave it in the same dtype: half the bytes for `data` to sum.
    leaves = [x.astype(dtype) if len(v.axes) >= 2 else x for x, v in zip(leaves, variables, strict=True)]

    def gather(block: Any) -> Any:
        parts, structure = jax.tree.flatten(block)
        return jax.tree.unflatten(structure, [_whole(x, spec) for x, spec in zip(parts, specs, strict=True)])

    def local(x: jax.Array, leaves: list[jax.Array], batch: Any) -> jax.Array:
        return function(x, jax.tree.unflatten(treedef, leaves), batch, gather)

    rows = P(names)
    # Axes of one device are given up too: kernels that the compiler cannot cut ask for that.
    manual = {*names, *(name for name, size in mesh.shape.items() if size == 1)}
    return jax.shard_map(local, in_specs=(rows, specs, rows), out_specs=rows, axis_names=manual, check_vma=False)(
        x, leaves, batch
    )


def _only(spec: P, names: tuple[str, ...]) -> P:
    """The part of a PartitionSpec about some mesh axes."""
    return P(*(tuple(n for n in sharding.as_tuple(entry) if n in names) or None for entry in spec))


def _whole(x: jax.Array, spec: P) -> jax.Array:
    """Gathers one parameter of a block, of which `spec` describes the last dimensions, axis by axis."""
    for dim, entry in enumerate(tuple(spec)[len(spec) - x.ndim :]):
        for name in reversed(sharding.as_tuple(entry)):
            x = jax.lax.all_gather(x, name, axis=dim, tiled=True)
    return checkpoint_name(x, GATHERED)
