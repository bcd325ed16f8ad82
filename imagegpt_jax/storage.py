"""Paths that may be on `gs://`: whether a bucket answers, found out in seconds, and errors that a person can act on.

`etils.epath` reads and writes `gs://` through TensorFlow, which tries again for minutes before it gives up.
Orbax, which writes the checkpoints, asks Google's own client besides (`pip install 'imagegpt_jax[gcs]'`).
"""

import contextlib
import importlib.util
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from imagegpt_jax.cli import UserError

# How long a bucket may take to answer: reading credentials and one listing take less than two seconds. The program is
# to end within ten, of which a busy machine may spend five on importing TensorFlow.
_LONGEST, _SHORTEST, _ALL = 4.0, 2.0, 6.0
_STARTED = time.monotonic()
_PATH = re.compile(r"gs://[^\s,'\"+]+")
_CHECK = (
    "check the bucket's name, the network, and the credentials (`gcloud auth application-default login`, or the service"
    " account of the machine)."
)


def paths(*values: Any) -> list[str]:
    """The `gs://` paths in strings, however deep in mappings and sequences: one of each bucket, in their order."""
    found: dict[str, str] = {}

    def walk(value: Any) -> None:
        if isinstance(value, str):
            for path in _PATH.findall(value):
                found.setdefault(path.split("/")[2], path)
        elif isinstance(value, Mapping):
            walk(list(value.values()))
        elif isinstance(value, Sequence):
            for item in value:
                walk(item)

    walk(values)
    return list(found.values())


def check(*values: Any, workdir: str = "") -> None:
    """Checks that the buckets of all `gs://` paths in `values` and `workdir` answer.

    Args:
      values: flags and configs, see `paths`.
      workdir: a folder that checkpoints will be written into.

    Raises:
      UserError: if one does not answer within seconds, or the packages to write there are missing.
    """
    for path in paths(workdir, *values):
        _probe(path)
    if workdir.startswith("gs://"):
        for module in ("google.cloud.storage", "google.cloud.storage_control_v2"):
            if not _is_installed(module):
                raise UserError(f"checkpoints on {workdir} need Google's client: pip install 'imagegpt_jax[gcs]'.")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _probe(path: str) -> None:
    import tensorflow as tf  # seconds, which are not the bucket's
    from etils import epath

    errors: list[Exception] = []
    answered = threading.Event()

    def ask() -> None:
        try:
            epath.Path(path).exists()
        except (OSError, tf.errors.OpError) as e:
            errors.append(e)
        answered.set()

    threading.Thread(target=ask, daemon=True, name="ask bucket").start()
    seconds = min(_LONGEST, max(_SHORTEST, _ALL - (time.monotonic() - _STARTED)))
    if not answered.wait(seconds):
        raise UserError(f"{path} did not answer within {seconds:.0f} s: {_CHECK}")
    if errors:
        raise UserError(f"{path} cannot be reached ({_reason(errors[0])}): {_CHECK}")


@contextlib.contextmanager
def writing(folder: Any) -> Iterator[None]:
    """Around the first writing into a folder: what the file system or the bucket refuses becomes one sentence.

    Raises:
      UserError: if the folder cannot be written.
    """
    try:
        yield
    except Exception as e:
        if not isinstance(e, OSError) and not type(e).__module__.startswith("tensorflow"):
            raise
        where = _CHECK if str(folder).startswith("gs://") else "choose another folder, or change its permissions."
        raise UserError(f"{folder} cannot be written ({_reason(e)}): {where}") from e


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(getattr(error, "message", "") or error).split())
    # TensorFlow adds the path, which is said already; curl says what happened after "error details".
    text = re.sub(r"\s*when (reading|initiating|writing) .*", "", text)
    return text.rpartition("error details: ")[2][:200] or type(error).__name__
