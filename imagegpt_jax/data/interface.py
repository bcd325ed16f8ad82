"""What a data set is to everything that reads it: `Source`, random access to records.

A record is a dict: "id" (str), and as the set has them "image" (encoded bytes), "captions" (list of str), "label"
(int, -1 for none), "codes" (int32 [length]) with "grid" (rows, columns).
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """Random access to records. Implementations are safe to call from several threads.

    It may have more: `quarantine`, a `quarantine.Quarantine`, has bad records replaced by `pipeline.Batches`;
    `require(what)` raises UserError if records lack "captions", "label", "image" or "codes", where the source knows
    better than its first record; `names` are the ids of all records, and `describe()` is what `describe` gives.
    """

    @property
    def name(self) -> str:
        """The spec that opens it, or nearly so."""
        ...

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels; may be empty."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the content does."""
        ...

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Records by their numbers, in the order asked for."""
        ...


def describe(source: Source) -> str:
    """One line for a log: what a source says of itself, or its name and size."""
    own = getattr(source, "describe", None)
    return own() if own else f"{source.name}: {len(source)} records"
