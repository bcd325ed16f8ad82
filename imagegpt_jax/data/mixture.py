"""Several sources as one, with weights: the numbering is their concatenation, the order is `order.Order`'s business."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from imagegpt_jax.data.interface import Source, describe
from imagegpt_jax.data.order import quotas
from imagegpt_jax.errors import UserError


class Mixture:
    """A mixture of sources: example i is in the concatenation of all of them.

    Attributes:
      sources: the parts.
      weights: share of each in training batches (proportional to size unless given).
      label_names: of all parts, merged by name, so that a class that two parts share is one class.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        label_names: Sequence[str] | None = None,
    ):
        """Mixes sources.

        Args:
          sources: the parts.
          weights: share of each; in proportion to size by default.
          label_names: the numbering of labels, such as another split's; by default of all parts, merged.

        Raises:
          UserError: if a weight is not positive, or too small to be kept, or a part has a label of no such name.
        """
        self.sources = list(sources)
        self.weights = [float(w) for w in (weights if weights is not None else [len(s) for s in sources])]
        quotas(self.weights)
        self.name = " + ".join(f"{w:g}*{s.name}" for w, s in zip(self.weights, self.sources, strict=True))
        if len(self.sources) == 1:
            self.name = self.sources[0].name
        names = dict.fromkeys(name for s in self.sources for name in s.label_names)
        self.label_names = tuple(names if label_names is None else label_names)
        if strangers := [name for name in names if name not in self.label_names]:
            known = ", ".join(self.label_names[:8]) + (", ..." if len(self.label_names) > 8 else "")
            raise UserError(
                f"{self.name} has the class {strangers[0]!r}, which is none of those that are trained on ({known}):"
                " rename it, or leave its pictures out."
            )
        number = {name: i for i, name in enumerate(self.label_names)}
        self._label_maps = [[number[name] for name in s.label_names] for s in self.sources]
        parts = ",".join(f"{w!r}*{s.fingerprint}" for w, s in zip(self.weights, self.sources, strict=True))
        self.fingerprint = hashlib.sha256(parts.encode()).hexdigest()[:16]
        self._stops = np.cumsum([len(s) for s in self.sources])

    def __len__(self) -> int:
        return int(self._stops[-1])

    def describe(self) -> str:
        """One line for a log: what every part says of itself."""
        return " + ".join(map(describe, self.sources))

    def require(self, what: str) -> None:
        """Checks every part that can be checked; see `FolderSource.require`."""
        for source in self.sources:
            if hasattr(source, "require"):
                source.require(what)  # type: ignore[attr-defined]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads records by their numbers in the concatenation, with one call for each part."""
        index = np.asarray(indices, np.int64)
        part = np.searchsorted(self._stops, index, side="right")
        out: list[Any] = [None] * len(index)
        for i in np.unique(part):
            places = np.flatnonzero(part == i)
            start = self._stops[i - 1] if i else 0
            records = self.sources[i].__getitems__((index[places] - start).tolist())
            for place, record in zip(places, records, strict=True):
                if self._label_maps[i] and record.get("label", -1) >= 0:
                    record = {**record, "label": self._label_maps[i][record["label"]]}
                out[place] = record
        return out


def renumber(source: Source, label_names: Sequence[str]) -> Source:
    """The source with labels numbered as `label_names` are.

    Raises:
      UserError: if it has a label of no such name.
    """
    if tuple(source.label_names) == tuple(label_names):
        return source
    parts, weights = (source.sources, source.weights) if isinstance(source, Mixture) else ([source], None)
    return Mixture(parts, weights, label_names)
