"""A thread in every process that ends it when the run hangs: when a peer stops answering, or nothing goes forward.

A collective waits for ever for a process that is stopped or cut off, and holds the main thread while it waits. So each
process leaves a sign of life with the coordinator every second, and looks at those of the others. The process that
notices writes the stacks of its threads to `W/stacks/`, says which process is missing, and ends with status 76.

Settings, in seconds: IMAGEGPT_JAX_HEARTBEAT_SECONDS, how long a process may be silent (40); and
IMAGEGPT_JAX_STALL_SECONDS, how long a run may take for a step, with evaluations and compilation (3600).
"""

import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from imagegpt_jax.runtime.cluster import first_line, number

EXIT_HANG = 76
_POLL_SECONDS = 1.0


def silence_seconds() -> int:
    """How long a process may be silent before it counts as gone."""
    return number("IMAGEGPT_JAX_HEARTBEAT_SECONDS") or 40


def stall_seconds() -> int:
    """How long a run may take for a step."""
    return number("IMAGEGPT_JAX_STALL_SECONDS") or 3600


class Watchdog:
    """Watches this process and its peers until `stop`.

    Args:
      end: called with one sentence when the run hangs; does not return.
      signs: the coordinator's store, with `put(text)` for this process's sign of life and `all()` for everybody's, by
        number of the process; None for a process that runs alone.
      count: how many processes there are.
    """

    def __init__(self, end: Callable[[str], None], signs: Any = None, count: int = 1):
        self._end, self._signs = end, signs
        self._stopped = threading.Event()
        self._step, self._moved = 0, time.monotonic()
        self._answered = self._ticked = time.monotonic()
        # By number of the process, its last sign and when that came: a count and a step.
        self._seen = dict.fromkeys(range(count if signs is not None else 0), ("[0, 0]", self._moved))
        self._refusal = ""  # what the coordinator's store last said instead of an answer
        if signs is not None:
            threading.Thread(target=self._exchange, daemon=True, name="signs of life").start()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def progress(self, step: int) -> None:
        """Notes that the main thread has come to a step."""
        self._step, self._moved = step, time.monotonic()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def _exchange(self) -> None:
        """Leaves and reads signs of life; a call may hang for as long as the coordinator does."""
        count = 0
        while not self._stopped.wait(_POLL_SECONDS):
            count += 1
            try:
                self._signs.put(json.dumps([count, self._step]))
                signs = self._signs.all()
            except Exception as e:  # the coordinator's client has no type of its own for them
                self._refusal = f" ({first_line(e)})"
                continue  # `_watch` ends the process when this goes on, and says why
            self._refusal = ""
            self._answered = now = time.monotonic()
            for index, text in signs.items():
                if index not in self._seen or self._seen[index][0] != text:
                    self._seen[index] = (text, now)

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            now, before = time.monotonic(), self._ticked
            self._ticked = now
            if problem := self._problem(now, before):
                if not self._stopped.is_set():
                    self._end(problem)
                return

    def _problem(self, now: float, before: float) -> str | None:
        silence, stall = silence_seconds(), stall_seconds()
        if now - before > silence:
            return f"this process was itself stopped for {now - before:.0f} s"
        if self._signs is not None:
            if now - self._answered > silence:
                return f"process 0 has not answered for {now - self._answered:.0f} s{self._refusal}"
            for index, (_, seen) in sorted(self._seen.items()):
                if now - seen > silence:
                    return f"process {index} has not answered for {now - seen:.0f} s"
        if now - self._moved > stall:
            behind = {index: json.loads(text)[1] for index, (text, _) in self._seen.items()} or {0: self._step}
            slowest = min(behind.values())
            names = ", ".join(str(index) for index, step in sorted(behind.items()) if step == slowest)
            return f"no step for {now - self._moved:.0f} s (at step {slowest}: process {names})"
        return None


def write_stacks(workdir: str | None, name: str) -> str:
    """Writes what every thread of this process is doing; returns where to, or "" if that failed."""
    try:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = file.read()
        if workdir is None:
            print(text, file=sys.stderr)
            return "above"
        folder = epath.Path(workdir) / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text)
        return os.fspath(folder / f"{name}.txt")
    except Exception:  # nothing may keep the process from ending
        return ""
