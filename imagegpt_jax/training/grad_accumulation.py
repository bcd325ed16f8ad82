"""Gradient accumulation: a batch goes through the network in parts, one after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from imagegpt_jax.models import layers
from imagegpt_jax.parallel import sharding
from imagegpt_jax.training import train_metrics

# Of a (part of a) batch: what is summed over parts, such as gradients; metrics; arrays with a row for each example.
Part = tuple[Any, train_metrics.Totals, Any]


def accumulate(function: Callable[[Any], Part], batch: Any, parts: int) -> Part:
    """Runs `function` on each of `parts` parts of a batch, and returns what it would return for all of it.

    A part is every parts-th row, not a block of neighbours: each device then cuts the rows that it holds, and none
    travel. Sums are kept in float32 (float64 for float64) until all parts are in.

    Args:
      function: part of the batch -> (arrays to sum, metrics to merge, arrays to put together by rows).
      batch: tree of arrays of B rows, a multiple of `parts` times the devices that the batch is sharded over.
      parts: number of parts; 1 calls the function and does nothing else.

    Returns:
      (sums over the parts, merged metrics, arrays whose rows are in the order of the batch)
    """
    if parts == 1:
        return function(batch)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x, (None, "batch", *(None,) * (x.ndim - 2)))

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    cuts = jax.tree.map(cut, batch)
    kinds, empty, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], cuts))

    def body(carry: tuple[Any, train_metrics.Totals], part: Any) -> tuple[tuple[Any, train_metrics.Totals], Any]:
        sums, totals = carry
        values, measured, rows = function(part)
        sums = jax.tree.map(lambda s, v: s + v.astype(s.dtype), sums, values)
        return (sums, train_metrics.merge(totals, measured)), rows

    start = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, layers.accumulation_dtype(x.dtype)), kinds),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty),
    )
    (sums, totals), rows = jax.lax.scan(body, start, cuts)
    return jax.tree.map(lambda s, x: s.astype(x.dtype), sums, kinds), totals, jax.tree.map(join, rows)
