"""Which of how many processes this one is, and where the others are: read from the environment.

JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID count where they are set; for the rest JAX's own detection
is asked, which knows Cloud TPU, GKE, SLURM and Open MPI.
"""

import dataclasses
import os
import re
import warnings
from typing import Any

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import malloc

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# What variables of launchers begin with. TPU slices are known by their chips: JAX sets TPU_ variables on any machine.
_LAUNCHERS = (ADDRESS, COUNT, INDEX, "SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_INDEX")
# Variables of launchers that start many processes, by which a launch that JAX does not recognise is noticed.
_PEERS = {"OMPI_COMM_WORLD_SIZE": "Open MPI", "JOB_COMPLETION_INDEX": "an indexed Kubernetes job"}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What a process must know to find the others.

    Attributes:
      address: "host:port" of process 0.
      count: number of processes.
      index: number of this one.
      local_devices: accelerators of this host that are this process's; None = all.
    """

    address: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def may_have_others() -> bool:
    """Whether anything says that this may be one of many processes; at once, where `find` takes seconds."""
    if os.environ.get(COUNT) == "1":
        return False
    return not malloc.on_processor() or any(name.startswith(_LAUNCHERS) for name in os.environ)


def find() -> Cluster | None:
    """Which of how many processes this is; None for one that runs alone.

    Raises:
      UserError: if the environment says that there are others, and not where.
    """
    told: Any = (os.environ.get(ADDRESS) or None, number(COUNT), number(INDEX))
    (address, count, index), local = told, None
    if count == 1:
        return None
    if None in (address, count, index):
        given = [name for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)]
        address, count, index, local = _detect(address, count, index)
        if None in (address, count, index):
            launcher = next((name for variable, name in _PEERS.items() if _has_peers(variable)), None)
            if not given and launcher is None:
                return None
            why = f"{', '.join(given)} is set without the rest" if given else f"this is a process of {launcher}"
            raise UserError(
                f"{why}, and where the other processes are is not known: set {ADDRESS}=host:port, {COUNT} and"
                f" {INDEX}, or {COUNT}=1 to run alone."
            )
    if count == 1:
        return None
    if os.environ.get("JAX_LOCAL_DEVICE_IDS") or re.fullmatch(
        r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    ):
        local = None  # JAX reads the first itself, and takes one device of a node for its only process
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{ADDRESS}={address!r} is no address: write host:port, such as 10.0.0.1:8476.")
    if count < 1 or not 0 <= index < count:
        raise UserError(f"process {index} of {count} is not possible: {INDEX} is from 0 to {COUNT} - 1.")
    return Cluster(address, count, index, tuple(local) if local else None)


def _detect(address: str | None, count: int | None, index: int | None) -> tuple[Any, Any, Any, Any]:
    """JAX's own detection of a cluster, for what is not given."""
    from jax._src.clusters import ClusterEnv  # the public `jax.distributed.initialize` does not say what it detects

    try:
        with warnings.catch_warnings():
            # In any pod without the package `kubernetes`, which our recipe does not need.
            warnings.simplefilter("ignore")
            return ClusterEnv.auto_detect_unset_distributed_params(address, count, index, None, None, start_seconds())
    except Exception as e:  # metadata servers, name servers and the Kubernetes API fail in many ways
        by_itself = "KUBERNETES_SERVICE_HOST" in os.environ and not _has_peers("JOB_COMPLETION_INDEX")
        # A machine with TPU chips and without Google's metadata server, such as a hosted notebook, is no part of a pod.
        if by_itself or type(e).__module__.startswith("requests"):
            return address, count, index, None
        raise UserError(
            f"the other processes of this launch were not found ({first_line(e)}): set {ADDRESS}=host:port, {COUNT}"
            f" and {INDEX}, or {COUNT}=1 to run alone."
        ) from e


def _has_peers(variable: str) -> bool:
    value = os.environ.get(variable, "")
    return value.isdecimal() and (variable != "OMPI_COMM_WORLD_SIZE" or int(value) > 1)


def number(name: str) -> int | None:
    """The number in an environment variable; None if it is not set.

    Raises:
      UserError: if it holds something else.
    """
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} is not a number.")
    return int(text)


def start_seconds() -> int:
    """How long to wait for all processes at the start."""
    return number("IMAGEGPT_JAX_START_SECONDS") or 300


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
