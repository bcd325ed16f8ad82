"""Some records of a data source, as a source."""

import hashlib
from collections.abc import Sequence
from typing import Any

from imagegpt_jax.data.interface import Source, describe


class Subset:
    """Some records of a source, in a given order; with a `name` it is a data set of its own."""

    def __init__(self, source: Source, indices: Sequence[int], name: str = ""):
        self._source, self._indices = source, list(indices)
        self.name, self.label_names = name or source.name, source.label_names
        self.fingerprint = source.fingerprint
        if name:
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} {self._indices}".encode()).hexdigest()[:16]
        self.info = getattr(source, "info", {})
        self.quarantine = None

    def __len__(self) -> int:
        return len(self._indices)

    def describe(self) -> str:
        """One line for a log: how many records of what."""
        return f"{len(self)} of {describe(self._source)}"

    def require(self, what: str) -> None:
        """As the source's own, of all its records."""
        getattr(self._source, "require", lambda what: None)(what)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Records of the source."""
        return self._source.__getitems__([self._indices[i] for i in indices])
