"""Several sources as one, with weights: the numbering is their concatenation, the order is `order.Order`'s business."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from imagegpt_jax.data.interface import Source
from imagegpt_jax.data.order import quotas


class Mixture:
    """A mixture of sources: example i is in the concatenation of all of them.

    Attributes:
      sources: the parts.
      weights: share of each in training batches (proportional to size unless given).
      label_names: of all parts, merged by name, so that a class that two parts share is one class.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None):
        """Mixes sources.

        Raises:
          UserError: if a weight is not positive, or too small to be kept.
        """
        self.sources = list(sources)
        self.weights = [float(w) for w in (weights if weights is not None else [len(s) for s in sources])]
        quotas(self.weights)
        self.name = " + ".join(f"{w:g}*{s.name}" for w, s in zip(self.weights, self.sources, strict=True))
        self.label_names = tuple(dict.fromkeys(name for s in self.sources for name in s.label_names))
        number = {name: i for i, name in enumerate(self.label_names)}
        self._label_maps = [[number[name] for name in s.label_names] for s in self.sources]
        parts = ",".join(f"{w!r}*{s.fingerprint}" for w, s in zip(self.weights, self.sources, strict=True))
        self.fingerprint = hashlib.sha256(parts.encode()).hexdigest()[:16]
        self._stops = np.cumsum([len(s) for s in self.sources])

    def __len__(self) -> int:
        return int(self._stops[-1])

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
