"""A thread that makes batches before they are asked for."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

# How many items ahead.
AHEAD = 2


class Prefetch:
    """Runs an iterator in a thread, up to `AHEAD` items ahead; its exceptions come out of `get`."""

    def __init__(self, make: Callable[[], Iterator[Any]]):
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._last: tuple[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True, name="batches")
        self._thread.start()

    def _run(self, make: Callable[[], Iterator[Any]]) -> None:
        try:
            for item in make():
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as e:  # shown where the batch is asked for
            self._put(("error", e))

    def _put(self, entry: tuple[str, Any]) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def get(self) -> Any:
        """The next item; raises StopIteration after the last one."""
        if self._stopped.is_set():
            raise StopIteration
        kind, value = self._last or self._queue.get()
        if kind == "item":
            return value
        self._last = (kind, value)
        if kind == "error":
            raise value
        raise StopIteration

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)  # a thread inside TensorFlow while Python exits would crash it
