"""The notice that a machine will be taken away: SIGTERM, or Ctrl-C, at any host at any moment.

All processes of a run learn of it and stop after the same step. With several processes JAX's preemption service finds
the step. A second Ctrl-C ends the program at once.
"""

import os
import signal
from typing import Any

# EX_TEMPFAIL of sysexits.h: start the same command again. The recipes in `launch/` do so.
EXIT_PREEMPTED = 75


class Preempted(Exception):
    """Raised in work that a notice may interrupt, such as an evaluation."""


class Notice:
    """Whether this run has been given notice; `listen` begins to look out for it."""

    def __init__(self) -> None:
        self.given = False
        self._signalled = False
        self._service = False
        self._calls = 0

    def listen(self) -> None:
        """Takes SIGTERM and SIGINT from here on; called by the main thread, once JAX's processes have met."""
        import jax

        self._service = jax.process_count() > 1
        if not self._service:  # the service takes SIGTERM itself
            signal.signal(signal.SIGTERM, self._noted)
        signal.signal(signal.SIGINT, self._interrupted)

    def _noted(self, signum: int, frame: Any) -> None:
        self._signalled = True

    def _interrupted(self, signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._service:
            os.kill(os.getpid(), signal.SIGTERM)
        self._signalled = True

    def reached(self) -> bool:
        """Whether to stop here. Every process calls this equally often, at the same places."""
        if not self.given:
            if self._service:
                from jax.experimental import multihost_utils

                self._calls += 1
                self.given = multihost_utils.reached_preemption_sync_point(self._calls)
            else:
                self.given = self._signalled
        return self.given

    def check(self) -> None:
        """Raises Preempted if the run is to stop; between the batches of an evaluation."""
        if self.reached():
            raise Preempted


# The notice that evaluations look at; a program that is not given any never hears of it.
current = Notice()
