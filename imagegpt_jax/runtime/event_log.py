"""`events.jsonl`: what happened to a run, one line an event, so that its troubles can be told afterwards.

Each line has `time` (seconds since 1970), `event`, and facts of its own. Events: start, init, compile, steps,
evaluation, restore, save, verify, save_failed, damaged, skip, rollback, quarantine, preempted, hang, exit.
`tools/goodput.py` computes from them where the time of a run went.
"""

import contextlib
import json
import threading
import time
from typing import Any

from etils import epath

from imagegpt_jax.runtime import filesystem

NAME = "events.jsonl"


class Log:
    """Appends events to a workdir's file; each is on disk when `write` returns.

    Args:
      workdir: the run's folder; None writes nothing, for the processes that are not the first.
    """

    def __init__(self, workdir: epath.PathLike | None):
        self._path = None if workdir is None else epath.Path(workdir) / NAME
        self._lock = threading.Lock()  # checkpoints are finished by a thread

    def write(self, event: str, **facts: Any) -> None:
        """Notes an event.

        Raises:
          UserError: if the file cannot be written.
        """
        if self._path is None:
            return
        line = json.dumps({"time": time.time(), "event": event, **facts}) + "\n"
        with self._lock, filesystem.writing(self._path), self._path.open("a") as file:
            file.write(line)


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """All events of a run in order; lines that a kill or a disk has torn are left out."""
    path = epath.Path(workdir) / NAME
    events = []
    for line in path.read_bytes().decode("utf-8", "replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and {"time", "event"} <= event.keys():
                events.append(event)
    return events
