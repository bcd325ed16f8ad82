"""One program in many processes: they find each other, agree before anything is written, and fail together.

In a process that runs alone (`runtime.cluster.find`), functions here do nothing, but that `initialize` settles how
memory is handed out (`runtime/malloc.py`). `jax.distributed` lets a process whose peer failed wait in a collective, or
ends it by an abort that names no cause; so the one that fails leaves the cause with the coordinator, where the others
look for it.

IMAGEGPT_JAX_START_SECONDS is how long to wait for all processes at the start; `runtime/watchdog.py` has further
settings.
"""

import contextlib
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from etils import epath

from imagegpt_jax.cli import EXIT_FAILURE
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import exit_report, malloc
from imagegpt_jax.runtime.cluster import INDEX, Cluster, find, first_line, may_have_others, start_seconds
from imagegpt_jax.runtime.watchdog import EXIT_HANG, Watchdog, check_settings, silence_seconds

_SHUTDOWN_SECONDS = 300
_KEY = "imagegpt_jax"
_POLL_SECONDS = 1.0
_DAY_MS = 24 * 3600 * 1000
# What a collective says when a peer is gone: a consequence, of which the cause may yet arrive.
_LOST = re.compile(
    r"\bgloo|\bnccl|connection (reset|closed|refused)|socket closed|coordination ?service|distributed service",
    re.IGNORECASE,
)
_PATIENCE_SECONDS = 3.0
_TELLING_SECONDS = 60  # how long a process that cannot work waits for the others, to let them know


# ------------------------------------------------------------------------------------------------------------- joining


class _Group:
    """The processes of a run, once they have found each other."""

    def __init__(self, cluster: Cluster, client: Any):
        self.cluster, self.client = cluster, client
        self.name = f"process {cluster.index} of {cluster.count} on {socket.gethostname()}"
        self._ended = threading.Event()
        self._meetings = 0
        self._dog = Watchdog(self._hangs, _Signs(client, cluster.index), cluster.count)
        threading.Thread(target=self._watch, daemon=True, name="watch for failures").start()

    def barrier(self) -> None:
        """Waits for all; ends when one of them fails."""
        self._meetings += 1
        # A peer that fails ends this process: no limit on the patience with slow ones is needed.
        self.client.wait_at_barrier(f"{_KEY}/meeting/{self._meetings}", _DAY_MS)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value."""
        self._meetings += 1
        key = f"{_KEY}/gathering/{self._meetings}"
        self.client.key_value_set(f"{key}/{self.cluster.index}", json.dumps(value))
        return [
            json.loads(self.client.blocking_key_value_get(f"{key}/{i}", _DAY_MS)) for i in range(self.cluster.count)
        ]

    def cause(self) -> str | None:
        """Why a process failed, once one has."""
        try:
            return json.loads(self.client.key_value_try_get(f"{_KEY}/failure"))
        except Exception as e:
            if "NOT_FOUND" in str(e):
                return None
            raise

    def fail(self, cause: str) -> None:
        """Tells the others why this process fails, unless another was first or the coordinator is gone."""
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{_KEY}/failure", json.dumps(f"{self.name}: {cause}"))

    def leave(self, code: int = EXIT_FAILURE) -> None:
        """Ends this process at once: whatever waits for the others on the way out of Python would wait for ever.

        Process 0 is the coordinator: it stays until the others have read the cause, for a few seconds at most.
        """
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{_KEY}/read/{self.cluster.index}", "1", allow_overwrite=True)
            until = time.monotonic() + 5
            while self.cluster.index == 0 and time.monotonic() < until:
                if len(self.client.key_value_dir_get(f"{_KEY}/read/")) == self.cluster.count:
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
        self._dog.stop()

    def progress(self, step: int) -> None:
        """Notes that the main thread has come to a step."""
        self._dog.progress(step)

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
        self._client.key_value_set(f"{_KEY}/alive/{self._index}", text, allow_overwrite=True)

    def all(self) -> dict[int, str]:
        found = self._client.key_value_dir_get(f"{_KEY}/alive/")
        return {int(key.rpartition("/")[2]): text for key, text in found}


_group: _Group | None = None
_alone: Watchdog | None = None


def initialize(preemptible: bool = False, patience: float = math.inf) -> None:
    """Joins the other processes, if there are any, and keeps host memory; before anything touches a device.

    Processes other than the first are silent from here on, except when they fail.

    Args:
      preemptible: whether the program looks out for `runtime.preemption.Notice`; else SIGTERM ends it.
      patience: seconds to wait for the others, where IMAGEGPT_JAX_START_SECONDS are more.

    Raises:
      UserError: if the others are not found in time.
    """
    global _group
    malloc.keep()
    check_settings()
    cluster = find()
    if cluster is None or _group is not None:
        return
    if cluster.index:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
        warnings.simplefilter("ignore")  # process 0 warns of the same
    import jax
    from jax._src import distributed  # the key-value store of the coordinator has no public name

    seconds, silence = min(start_seconds(), patience), silence_seconds()
    # With it JAX takes SIGTERM for itself, as the notice of a preemption that somebody has to ask about.
    jax.config.update("jax_enable_preemption_service", preemptible)
    started = time.monotonic()
    if cluster.index:
        _wait_for_coordinator(cluster, seconds)
    # Past its own limit JAX aborts the process, so ours comes first.
    timer = threading.Timer(max(1.0, seconds - (time.monotonic() - started)), _not_all_came, [cluster, seconds])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            cluster.address,
            cluster.count,
            cluster.index,
            cluster.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(seconds) + 60,
            heartbeat_timeout_seconds=2 * silence + 30,  # past it JAX aborts: the watchdog comes first
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except Exception as e:
        raise UserError(
            f"process {cluster.index} of {cluster.count} could not join the others at {cluster.address}"
            f" ({first_line(e)}): check that the port is free on the first host and open to the others."
        ) from e
    finally:
        timer.cancel()
    _group = _Group(cluster, distributed.global_state.client)


def _wait_for_coordinator(cluster: Cluster, seconds: float) -> None:
    """Waits until process 0 listens: JAX itself would abort at the end of its patience."""
    host, _, port = cluster.address.rpartition(":")
    until = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(10.0, seconds)):
                return
        except OSError as e:
            if time.monotonic() > until:
                raise UserError(
                    f"process {cluster.index} of {cluster.count} on {socket.gethostname()} did not reach process 0 at"
                    f" {cluster.address} within {seconds:.0f} s ({e.strerror or e}): check that it runs, and that this"
                    " host can reach that port."
                ) from e
            time.sleep(min(0.5, seconds / 10))


def _not_all_came(cluster: Cluster, seconds: float) -> None:
    exit_report.say(
        f"process {cluster.index} of {cluster.count} on {socket.gethostname()}: not all {cluster.count} processes came"
        f" to {cluster.address} within {seconds:.0f} s: check that every one runs, each with its own number ({INDEX}),"
        " and that its host can reach that port."
    )
    os._exit(EXIT_FAILURE)


# ---------------------------------------------------------------------------------------------------- failing together


def report_failure(error: UserError) -> None:
    """Lets the others end with this process, which fails before it has joined them: what is wrong here alone, such as
    a disk that is not mounted, would else leave them waiting. Returns in a process that runs alone.
    """
    if not may_have_others():
        return  # without the seconds that `find` takes
    try:
        if find() is None:
            return
    except UserError:  # where the others are
        return
    cause = " ".join(str(error).split())
    exit_report.say(cause)  # now: the others may take a while to come
    with contextlib.suppress(UserError):  # they do not come
        initialize(patience=_TELLING_SECONDS)
    if _group is not None:
        _group.stop_watching()
        _group.fail(cause)
        _group.leave()
    os._exit(EXIT_FAILURE)


@contextlib.contextmanager
def distributed_context(preemptible: bool = False) -> Iterator[None]:
    """Around a program's work: joins the other processes before, parts from them after, and ends all if one fails."""
    global _group
    initialize(preemptible)
    if _group is None:
        yield
        return
    with failing_jointly():
        yield
        _group.end()
        _group = None


@contextlib.contextmanager
def failing_jointly() -> Iterator[None]:
    """Around work that waits for other processes: if it fails here, all processes end, each naming the cause.

    The process ends inside, without running what is further out: cleaning up would wait for processes that are gone.
    One that runs alone only has it noted.
    """
    try:
        yield
    except BaseException as e:
        if _group is not None:
            _fail(_group, e)
        exit_report.note("exit", why=f"{type(e).__name__}: {first_line(e)}")
        raise


def is_loss_of_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone, as collectives and barriers do."""
    if _group is None or not isinstance(error, Exception) or isinstance(error, OSError | UserError):
        return False  # of those the first is of files and connections of this process's own
    return bool(_LOST.search(first_line(error)))


def _fail(group: _Group, error: BaseException) -> None:
    code = EXIT_FAILURE
    if isinstance(error, UserError):
        cause = " ".join(str(error).split())
    elif isinstance(error, KeyboardInterrupt):
        cause, code = "stopped by a signal before the end.", 130
    elif isinstance(error, SystemExit):
        cause = f"ended with status {error.code}."
    elif is_loss_of_peer(error):
        known = _wait_for_cause(group)
        if known:
            exit_report.say(f"{group.name} ends, because of {known}", f"because of {known}")
            group.leave()
        cause = f"lost another process, which says more itself if it could ({first_line(error)})."
    else:
        cause = f"{type(error).__name__}: {first_line(error)}"
        traceback.print_exception(error)
    group.stop_watching()
    exit_report.say(f"{group.name}: {cause}", cause)
    group.fail(cause)
    group.leave(code)


def _wait_for_cause(group: _Group) -> str | None:
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(Exception):
            if cause := group.cause():
                return cause
        time.sleep(0.1)
    return None


@contextlib.contextmanager
def watched(workdir: epath.PathLike, log: Any) -> Iterator[None]:
    """Around a training: a hang is written into its folder; a process that runs alone is watched as well.

    Args:
      workdir: gets `stacks/`.
      log: an `training.event_log.Log`, which gets an event "hang".
    """
    global _alone
    with exit_report.kept_in(workdir, log):
        if _group is None:
            _alone = Watchdog(_hangs_alone)
        try:
            yield
        finally:
            if _alone is not None:
                _alone.stop()
                _alone = None


def _hangs_alone(problem: str) -> None:
    exit_report.hang("the training", 0, problem)
    os._exit(EXIT_HANG)


def progress(step: int) -> None:
    """Notes that the main thread has come to a step."""
    if _group is not None:
        _group.progress(step)
    elif _alone is not None:
        _alone.progress(step)


# ------------------------------------------------------------------------------------------------------------ agreeing


def is_main_process() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return _group is None or _group.cluster.index == 0


def barrier() -> None:
    """Waits until all processes are here."""
    if _group is not None:
        _group.barrier()


def wait_for_file(path: epath.Path) -> None:
    """Waits for all processes, and checks that each of them sees the file that the first one wrote.

    Raises:
      UserError: if it is not there: the processes have no file system in common.
    """
    if _group is None:
        return
    barrier()
    until = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():  # a network file system may lag behind
        if time.monotonic() > until:
            raise UserError(
                f"{path}, which process 0 wrote, is not there: with several hosts the folder must be on gs:// or on a"
                " file system that all of them share."
            )
        time.sleep(0.2)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by their number; each is one that JSON can write."""
    if _group is None:
        return [value]
    return _group.gather(value)


def assert_equal(**facts: Any) -> None:
    """Waits for all processes, and checks that they work on the same thing.

    Args:
      facts: name -> value that JSON can write, the same everywhere.

    Raises:
      UserError: if a value of this process differs from process 0's.
    """
    if _group is None:
        return
    mine = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    key = f"{_KEY}/facts/{','.join(mine)}"
    if is_main_process():
        _group.client.key_value_set(key, json.dumps(mine))
    first = json.loads(_group.client.blocking_key_value_get(key, _DAY_MS))
    different = [name.replace("_", " ") for name in mine if mine[name] != first[name]]
    if different:
        raise UserError(
            f"this process has another {' and another '.join(different)} than process 0: start every process with the"
            " same command, on the same files and library versions."
        )
    barrier()
