"""What every evaluation shares: running a predict function over padded batches with exact counts.

The last batch of a split is padded to the size of the others and carries `mask`, so that one compiled program scores
the whole split and no example is dropped or counted twice. Statistics are summed on the host in float64.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imagegpt_jax.errors import UserError
from imagegpt_jax.parallel import sharding
from imagegpt_jax.runtime import preemption


class Mean:
    """Weighted streaming mean in float64, one per name."""

    def __init__(self) -> None:
        self._total: dict[str, float] = collections.defaultdict(float)
        self._weight: dict[str, float] = collections.defaultdict(float)

    def add(self, values: Mapping[str, np.ndarray], weights: np.ndarray) -> None:
        """Adds arrays of values, each weighted elementwise; values of weight 0 may be anything, NaN included."""
        keep = np.asarray(weights) > 0
        kept = np.asarray(weights, np.float64)[keep]
        for name, value in values.items():
            self._total[name] += float(np.sum(np.asarray(value, np.float64)[keep] * kept))
            self._weight[name] += float(np.sum(kept))

    def result(self) -> dict[str, float]:
        """The means; raises UserError if nothing was added."""
        if not self._weight or min(self._weight.values()) == 0:
            raise UserError("there is nothing to evaluate: the evaluation data set is empty.")
        return {name: total / self._weight[name] for name, total in self._total.items()}


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy in bits of the empirical distribution with these counts (0 for no counts)."""
    counts = np.asarray(counts, np.float64)
    p = counts[counts > 0] / max(counts.sum(), 1.0)
    return float(-np.sum(p * np.log2(p))) if p.size else 0.0


def to_host(tree: Any) -> Any:
    """Global arrays -> NumPy arrays, whole on every process."""
    meshes = {x.sharding.mesh for x in jax.tree.leaves(tree) if not (x.is_fully_addressable or x.is_fully_replicated)}
    for mesh in meshes:  # at most one: the mesh of the training, which need not be the one in force
        with jax.set_mesh(mesh):
            tree = _gather(mesh)(tree)
    return jax.tree.map(np.asarray, tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    """One program that gives every device the whole of each array of a tree."""
    return jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))


def outputs(
    fn: Callable[[Any, dict[str, jax.Array]], Any],
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    columns: Sequence[str],
    mesh: Mesh,
    rows: int = 0,
) -> Iterator[Any]:
    """Runs `fn(params, batch)` over batches and yields its outputs on the host, one batch behind the device.

    Args:
      fn: a compiled function of (params, {column: global array}).
      params: its first argument.
      batches: batches of this process's rows, such as `pipeline.Batches` yields.
      columns: the columns that `fn` needs; "mask" is made (all True) where the batches have none.
      mesh: devices to run on.
      rows: of a device at once, of which batches have a multiple: no result then depends on their size; 0 for all.

    Raises:
      UserError: if the data lacks a column.
    """
    pending = None
    for batch in _split(batches, rows, mesh) if rows else batches:
        preemption.current.check()
        if pending is not None:
            yield to_host(pending)
        pending = fn(params, sharding.put_batch(_select(batch, columns), mesh))
    if pending is not None:
        yield to_host(pending)


def _split(batches: Iterable[Mapping[str, np.ndarray]], rows: int, mesh: Mesh) -> Iterator[dict[str, np.ndarray]]:
    """Batches of a fixed number of rows for each device, which are the same for batches of any size."""
    parts = len(mesh.local_devices)
    for batch in batches:
        each = len(next(iter(batch.values()))) // parts
        for start in range(0, each, rows):
            yield {
                name: x.reshape(parts, each, *x.shape[1:])[:, start : start + rows].reshape(-1, *x.shape[1:])
                for name, x in batch.items()
            }


def _select(batch: Mapping[str, np.ndarray], columns: Sequence[str]) -> dict[str, np.ndarray]:
    whole = {"mask": np.ones(len(next(iter(batch.values()))), bool), **batch}
    for name in columns:
        if name not in whole:
            raise UserError(f"the evaluation data has no {name!r}: it holds {', '.join(sorted(batch))}.")
    return {name: whole[name] for name in columns}
