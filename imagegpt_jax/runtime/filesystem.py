"""Files that may be on `gs://`: whether a bucket answers within seconds, writing them whole, and errors with a remedy.

`etils.epath` reads and writes `gs://` through TensorFlow, which tries again for minutes before it gives up.
Orbax, which writes the checkpoints, asks Google's own client besides (`pip install 'imagegpt_jax[gcs]'`).
"""

import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from imagegpt_jax.errors import UserError

# How long a bucket may take to answer: reading credentials and one listing take less than two seconds. The program is
# to end within ten, of which a busy machine may spend five on importing TensorFlow.
_LONGEST, _SHORTEST, _ALL = 4.0, 2.0, 6.0
_STARTED = time.monotonic()
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PATH = re.compile(r"gs://[^\s,'\"+]+")
_CHECK = (
    "check the bucket's name, the network, and the credentials (`gcloud auth application-default login`, or the service"
    " account of the machine)."
)


def cache_dir() -> pathlib.Path:
    """Returns the folder for files that can be made again: $IMAGEGPT_JAX_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("IMAGEGPT_JAX_CACHE"):
        return pathlib.Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "imagegpt_jax"


def paths(*values: Any) -> list[str]:
    """The `gs://` paths in strings, however deep in dicts, lists and tuples: one of each bucket, in their order."""
    by_bucket: dict[str, str] = {}
    for path in _PATH.findall(json.dumps(values, skipkeys=True, default=lambda _: None, ensure_ascii=False)):
        by_bucket.setdefault(path.split("/")[2], path)
    return list(by_bucket.values())


def check(*values: Any) -> None:
    """Checks that the buckets of all `gs://` paths in `values` (see `paths`) are there and answer.

    Raises:
      UserError: if one is not there, or does not answer within seconds.
    """
    for path in paths(*values):
        _probe(path)


def check_client(workdir: str) -> None:
    """Checks that checkpoints can be written into a workdir as far as packages go.

    Raises:
      UserError: if it is on `gs://` and Google's client is missing.
    """
    modules = ("google.cloud.storage", "google.cloud.storage_control_v2") if workdir.startswith("gs://") else ()
    with contextlib.suppress(ModuleNotFoundError):  # of a package above it
        if all(map(importlib.util.find_spec, modules)):
            return
    raise UserError(f"checkpoints on {workdir} need Google's client: pip install 'imagegpt_jax[gcs]'.")


def _probe(path: str) -> None:
    import tensorflow as tf  # seconds, which are not the bucket's
    from etils import epath

    errors: list[Exception] = []
    exists: list[bool] = []
    answered = threading.Event()
    bucket = "/".join(path.split("/")[:3])

    def ask() -> None:
        try:
            exists.append(epath.Path(path).exists())
            if not exists[0]:  # neither, where there is no such bucket
                with contextlib.suppress(tf.errors.PermissionDeniedError):  # some may see a bucket's objects alone
                    exists.append(epath.Path(bucket).exists())
        except (OSError, tf.errors.OpError) as e:
            errors.append(e)
        answered.set()

    threading.Thread(target=ask, daemon=True, name="ask bucket").start()
    seconds = min(_LONGEST, max(_SHORTEST, _ALL - (time.monotonic() - _STARTED)))
    if not answered.wait(seconds):
        raise UserError(f"{path} did not answer within {seconds:.0f} s: {_CHECK}")
    if errors:
        raise UserError(f"{path} cannot be reached ({reason(errors[0])}): {_CHECK}")
    if exists == [False, False]:
        raise UserError(f"there is no bucket {bucket}: check its name, or make it (`gcloud storage buckets create`).")


@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
    """Around writing a file or into a folder: what the file system or the bucket refuses becomes one sentence.

    Raises:
      UserError: if it cannot be written.
    """
    try:
        yield
    except Exception as e:
        error: BaseException | None = e
        while error is not None and not is_refusal(error):  # a thread's error comes wrapped
            error = error.__cause__
        if error is None:
            raise
        why = reason(error)
        if getattr(error, "errno", None) in _FULL or re.search(r"no space|quota|too large", why, re.IGNORECASE):
            remedy = "make room there, and start the same command again."
        elif str(path).startswith("gs://"):
            remedy = _CHECK
        else:
            remedy = "choose another folder, or change its permissions."
        raise UserError(f"{path} cannot be written ({why}): {remedy}") from e


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[Any]:
    """Around writing a file whole or not at all: what is written beside it takes its name at the end.

    Args:
      path: the file; its folder is made.
      shared: whether several processes may write it at once, such as into a cache.

    Yields:
      the path to write to, an `epath.Path`; on an error nothing of it is left.
    """
    from etils import epath

    whole = epath.Path(path)
    whole.parent.mkdir(parents=True, exist_ok=True)
    unique = f"{uuid.uuid4().hex}." if shared else ""
    temporary = whole.parent / f".{whole.name}.{unique}tmp"
    try:
        yield temporary
        temporary.replace(whole)
    except BaseException:
        with contextlib.suppress(Exception):  # a file system that refuses to write may refuse this as well
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: str | os.PathLike[str], data: bytes | str, *, shared: bool = False) -> None:
    """Writes a file whole or not at all, see `replacing`."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_bytes(data if isinstance(data, bytes) else data.encode())


def prepare_folder(folder: str | os.PathLike[str], file: str = "") -> None:
    """Makes a folder of this machine that results will be written into, before the work that makes them.

    Args:
      folder: to be made.
      file: that will be written there; the error then names it.

    Raises:
      UserError: if it cannot be made, or nothing can be written there.
    """
    with writing(file or folder):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def is_refusal(error: BaseException) -> bool:
    """Whether an error is a file system's or a bucket's."""
    return isinstance(error, OSError) or type(error).__module__.startswith("tensorflow")


def reason(error: BaseException) -> str:
    """What a file system or a bucket says, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's
        return os.strerror(int(code.group(1)))
    text = str(getattr(error, "message", "") or error)
    if said := re.match(r"(?:{{.*?}} )?/[^;\n]*; ([^\n\[]+)", text):  # TensorFlow's of a file here: "path; reason"
        return said.group(1).strip()
    text = " ".join(text.split())
    if said := re.search(r'"message": "([^"]+)"', text):  # a bucket's own words
        return said.group(1)
    # TensorFlow adds the path, which is said already; curl says what happened after "error details".
    text = re.sub(r"\s*when (reading|initiating|writing) .*", "", text)
    return text.rpartition("error details: ")[2][:200] or type(error).__name__
