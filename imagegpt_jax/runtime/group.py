"""What the processes of a run do together, by the key-value store of JAX's coordinator, which is in process 0."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from imagegpt_jax.errors import EXIT_FAILURE
from imagegpt_jax.runtime import exit_report
from imagegpt_jax.runtime.cluster import Cluster, first_line
from imagegpt_jax.runtime.watchdog import EXIT_HANG, Watchdog

KEY = "imagegpt_jax"
DAY_MS = 24 * 3600 * 1000
_POLL_SECONDS = 1.0


class Group:
    """The processes of a run, once they are connected: barriers, values exchanged, and why one of them fails."""

    def __init__(self, cluster: Cluster, client: Any):
        self.cluster, self.client = cluster, client
        self.name = f"process {cluster.index} of {cluster.count} on {socket.gethostname()}"
        self._ended = threading.Event()
        self._meetings = 0
        self.watchdog = Watchdog(self._hangs, _Signs(client, cluster.index), cluster.count)
        threading.Thread(target=self._watch, daemon=True, name="watch for failures").start()

    def barrier(self) -> None:
        """Waits for all; ends when one of them fails."""
        self._meetings += 1
        # A peer that fails ends this process: no limit on the patience with slow ones is needed.
        self.client.wait_at_barrier(f"{KEY}/meeting/{self._meetings}", DAY_MS)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value."""
        self._meetings += 1
        key = f"{KEY}/gathering/{self._meetings}"
        self.client.key_value_set(f"{key}/{self.cluster.index}", json.dumps(value))
        return [json.loads(self.client.blocking_key_value_get(f"{key}/{i}", DAY_MS)) for i in range(self.cluster.count)]

    def cause(self) -> str | None:
        """Why a process failed, once one has."""
        try:
            return json.loads(self.client.key_value_try_get(f"{KEY}/failure"))
        except Exception as e:
            if "NOT_FOUND" in str(e):
                return None
            raise

    def fail(self, cause: str) -> None:
        """Tells the others why this process fails, unless another was first or the coordinator is gone."""
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{KEY}/failure", json.dumps(f"{self.name}: {cause}"))

    def leave(self, code: int = EXIT_FAILURE) -> None:
        """Ends this process at once: whatever waits for the others on the way out of Python would wait for ever.

        Process 0 is the coordinator: it stays until the others have read the cause, for a few seconds at most.
        """
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{KEY}/read/{self.cluster.index}", "1", allow_overwrite=True)
            until = time.monotonic() + 5
            while self.cluster.index == 0 and time.monotonic() < until:
                if len(self.client.key_value_dir_get(f"{KEY}/read/")) == self.cluster.count:
                    break
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            try:
                cause = self.cause()
            except Exception as e:
                if self._ended.is_set():
                    return
                cause = f"lost process 0 at {self.cluster.address} ({first_line(e)}): see its output"
            if cause:
                exit_report.say(f"{self.name} ends, because of {cause}", f"because of {cause}")
                self.leave()

    def stop_watching(self) -> None:
        """From here on, what other processes do does not end this one."""
        self._ended.set()
        self.watchdog.stop()

    def _hangs(self, problem: str) -> None:
        exit_report.hang(self.name, self.cluster.index, problem)
        if self.cluster.index == 0:  # the others read it here; the coordinator's own store cannot hang
            self.fail(problem)
        os._exit(EXIT_HANG)

    def end(self) -> None:
        """Parts from the others when all are done."""
        import jax

        self.barrier()
        self.stop_watching()
        jax.distributed.shutdown()
        # All is done: a launcher that ends the rest at the first exit may not turn this one's status into a signal's.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Signs:
    """Signs of life in the coordinator's key-value store."""

    def __init__(self, client: Any, index: int):
        self._client, self._index = client, index

    def put(self, text: str) -> None:
        self._client.key_value_set(f"{KEY}/alive/{self._index}", text, allow_overwrite=True)

    def all(self) -> dict[int, str]:
        signs = self._client.key_value_dir_get(f"{KEY}/alive/")
        return {int(key.rpartition("/")[2]): text for key, text in signs}
