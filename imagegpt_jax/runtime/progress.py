"""Progress: on a terminal bars that move; in a log lines, of most work every half minute."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm


class _Lines:
    """A text stream to which tqdm's redrawn line is a line each time."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def bar(*arguments: Any, **settings: Any) -> "tqdm":
    """A `tqdm` on stderr."""
    from tqdm import tqdm  # reads TQDM_DISABLE, which `distributed.initialize` sets, when it is imported

    if sys.stderr.isatty():
        return tqdm(*arguments, mininterval=1.0, **settings)
    return tqdm(*arguments, mininterval=30.0, file=_Lines(sys.stderr), **settings)


def print_step(name: str, step: int, last: int, metrics: Mapping[str, str], steps_per_second: float) -> None:
    """Prints the line of a training step to stderr."""
    from tqdm import tqdm

    left = tqdm.format_interval((last - step) / max(steps_per_second, 1e-9))
    shown = "".join(f", {key} {value}" for key, value in metrics.items())
    print(f"{name}: step {step}/{last}{shown}, {steps_per_second:.3g} steps/s, {left} left", file=sys.stderr)
