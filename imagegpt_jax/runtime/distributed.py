"""One program in many processes: they find each other, agree before anything is written, and fail together.

In a process that runs alone (`runtime.cluster.find`), functions here do nothing, but that `initialize` settles how
memory is handed out. `jax.distributed` lets a process whose peer failed wait in a collective, or aborts it without a
cause; so the one that fails leaves the cause with the coordinator, where the others look for it.
"""

import contextlib
import json
import math
import os
import re
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from etils import epath

from imagegpt_jax.errors import EXIT_FAILURE, UserError
from imagegpt_jax.runtime import compiled, event_log, exit_report, malloc
from imagegpt_jax.runtime.cluster import INDEX, Cluster, find, first_line, may_have_others, start_seconds
from imagegpt_jax.runtime.group import DAY_MS, KEY, Group
from imagegpt_jax.runtime.watchdog import EXIT_HANG, Watchdog, silence_seconds, stall_seconds

_SHUTDOWN_SECONDS = 300
# What a collective says when a peer is gone: a consequence, of which the cause may yet arrive.
_LOST = re.compile(
    r"\bgloo|\bnccl|connection (reset|closed|refused)|socket closed|coordination ?service|distributed service",
    re.IGNORECASE,
)
_PATIENCE_SECONDS = 3.0
_TELLING_SECONDS = 60  # how long a process that cannot work waits for the others, to let them know


# ------------------------------------------------------------------------------------------------------------- joining


_group: Group | None = None
_alone: Watchdog | None = None


def initialize(preemptible: bool = False, patience: float = math.inf) -> None:
    """Joins the other processes, if there are any, and keeps host memory; before anything touches a device.

    Processes other than the first are silent from here on, except when they fail.

    Args:
      preemptible: whether the program looks out for `runtime.preemption.Notice`; else SIGTERM ends it.
      patience: seconds to wait for the others, where IMAGEGPT_JAX_START_SECONDS are more.

    Raises:
      UserError: if the others do not come in time, or a setting is not a number.
    """
    global _group
    malloc.keep()
    silence, _ = silence_seconds(), stall_seconds()  # what is no number is told before a thread reads it
    cluster = find()
    if cluster is None or _group is not None:
        return
    if cluster.index:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
        warnings.simplefilter("ignore")  # process 0 warns of the same
    import jax
    from jax._src import distributed  # the key-value store of the coordinator has no public name

    if compiled.is_default:
        # Hosts read their own folders, and only process 0 writes: on GPUs one that finds a program there would leave
        # the others waiting for its part of the autotuning.
        jax.config.update("jax_compilation_cache_dir", None)
    seconds = min(start_seconds(), patience)
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
    _group = Group(cluster, distributed.global_state.client)


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


def _fail(group: Group, error: BaseException) -> None:
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


def _wait_for_cause(group: Group) -> str | None:
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(Exception):
            if cause := group.cause():
                return cause
        time.sleep(0.1)
    return None


@contextlib.contextmanager
def watched(workdir: epath.PathLike, log: event_log.Log) -> Iterator[None]:
    """Around a training: a hang leaves `stacks/` in the workdir and an event "hang"; one process is watched, too."""
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
    watchdog = _alone if _group is None else _group.watchdog
    if watchdog is not None:
        watchdog.progress(step)


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
    """Waits for all processes, and checks that the facts, which JSON can write, are the same everywhere.

    Raises:
      UserError: if a value of this process differs from process 0's.
    """
    if _group is None:
        return
    mine = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    key = f"{KEY}/facts/{','.join(mine)}"
    if is_main_process():
        _group.client.key_value_set(key, json.dumps(mine))
    first = json.loads(_group.client.blocking_key_value_get(key, DAY_MS))
    different = [name.replace("_", " ") for name in mine if mine[name] != first[name]]
    if different:
        raise UserError(
            f"this process has another {' and another '.join(different)} than process 0: start every process with the"
            " same command, on the same files and library versions."
        )
    barrier()
