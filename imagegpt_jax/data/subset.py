"""Some records of a data source, as a source."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagegpt_jax.data.interface import Source


class Subset:
    """Some records of a source, in a given order."""

    def __init__(self, source: "Source", indices: Sequence[int]):
        self._source, self._indices = source, list(indices)
        self.name, self.label_names, self.fingerprint = source.name, source.label_names, source.fingerprint
        self.quarantine = None

    def __len__(self) -> int:
        return len(self._indices)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Records of the source."""
        return self._source.__getitems__([self._indices[i] for i in indices])
