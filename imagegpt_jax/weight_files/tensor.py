"""An array in a file, opened without being read."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that is not read yet.

    Attributes:
      shape: its shape.
      dtype: its dtype, of NumPy or ml_dtypes.
      read: reads it; a fresh array each time.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def tree_leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of whatever is no dict in nested dicts."""
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, value in tree.items():
        yield from tree_leaves(value, f"{name}.{key}" if name else str(key))
