"""How a process ends that cannot go on: one sentence on stderr, and a note in the folder of its run."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from imagegpt_jax.runtime import event_log
from imagegpt_jax.runtime.watchdog import write_stacks

# How long a note may take: the folder may be on what hangs.
_PATIENCE_SECONDS = 5.0
_spoken = threading.Lock()
_workdir: str | None = None
_log: event_log.Log | None = None


@contextlib.contextmanager
def kept_in(workdir: epath.PathLike, log: event_log.Log) -> Iterator[None]:
    """Around a training, whose workdir gets `stacks/`, and whose log gets events."""
    global _workdir, _log
    _workdir, _log = os.fspath(workdir), log
    try:
        yield
    finally:
        _workdir = _log = None


def say(text: str, exit_because: str = "") -> None:
    """Prints the sentence, unless another thread of this process has spoken; with a reason also notes an exit."""
    if _spoken.acquire(blocking=False):
        print(f"error: {text}", file=sys.stderr, flush=True)
        if exit_because:
            note("exit", why=exit_because)


def note(event: str, **facts: Any) -> None:
    """Writes an event, if there is a training, and where it can be written within seconds."""
    log = _log
    if log is not None:
        _try(lambda: log.write(event, **facts))


def hang(who: str, process: int, problem: str) -> None:
    """Tells that a process ends because it hangs: its stacks, a sentence that begins with `who`, an event "hang"."""
    stacks: list[str] = []
    _try(lambda: stacks.append(write_stacks(_workdir, f"process-{process}")))
    say(f"{who} ends, because {problem}{f'; what it did: {stacks[0]}' if any(stacks) else ''}.")
    note("hang", reason=problem, process=process)


def _try(act: Callable[[], None]) -> None:
    def suppressed() -> None:
        with contextlib.suppress(Exception):
            act()

    thread = threading.Thread(target=suppressed, daemon=True, name="exit report")
    thread.start()
    thread.join(_PATIENCE_SECONDS)
