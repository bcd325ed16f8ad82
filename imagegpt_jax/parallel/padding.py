"""Batches of one fixed size, so that one compiled program runs them all and no row depends on how many there are.

The last batch is filled up with copies of its last row, and what is computed of those is dropped.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def padded_batches(total: int, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Cuts `total` rows into batches of `size`; yields (the rows a batch is of, the index of each of its rows)."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total)), np.minimum(np.arange(start, start + size), total - 1)


def pad(rows_BX: np.ndarray, size: int) -> np.ndarray:
    """At most `size` rows, filled up to `size` with copies of the last one."""
    return rows_BX[np.minimum(np.arange(size), len(rows_BX) - 1)]


def map_batches(
    fn: Callable[..., Any], size: int, *arrays: np.ndarray, fetch: Callable[[Any], np.ndarray] = np.asarray
) -> np.ndarray:
    """Runs a compiled function over the rows of arrays, `size` at a time, and keeps the device busy meanwhile.

    Args:
      fn: gets `size` rows of each array and gives an array with a row for each.
      size: rows of a batch.
      *arrays: of as many rows each, at least one.
      fetch: brings an output of `fn` onto the host, while the next batch runs.
    """
    outputs, running = [], None
    for _, rows_B in padded_batches(len(arrays[0]), size):
        dispatched = fn(*(array[rows_B] for array in arrays))
        if running is not None:
            outputs.append(fetch(running))
        running = dispatched
    return np.concatenate([*outputs, fetch(running)])[: len(arrays[0])]
