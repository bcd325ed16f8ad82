"""The manifest of a checkpoint: which files it has, with the hash of each, and what a run must know to continue.

The hash is XXH3 of 128 bits, which finds every kind of damage at the speed of memory; it is no signature, so a
checkpoint from somebody else is as trustworthy as its sender. The manifest holds a hash of itself.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import xxhash
from etils import epath

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import filesystem

NAME = "manifest.json"
# What it is called before it is whole; there from the beginning of a save.
PENDING = f"{NAME}.tmp"
FORMAT = 1
_CHUNK = 1 << 22
_THREADS = min(8, os.cpu_count() or 1)
# What a file system says of the file itself; anything else, such as a missing permission, says nothing about it.
_BAD_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP, errno.EUCLEAN, errno.EBADMSG)


class Damaged(Exception):
    """A checkpoint is not what was written; the message says what is wrong with which file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a checkpoint.

    Attributes:
      step: optimizer steps done.
      position: examples drawn from the data, by all processes together.
      skipped: windows of positions that training leaves out, ascending: (first, end) each.
      time: seconds since 1970 when the step was saved.
      metrics: the newest validation scores of the run.
      evaluated: whether the evaluation that was due after the step, if any, is done.
      config: the run's config.
      versions: library -> version.
      files: path within the step's folder -> (bytes, hash in hexadecimal).
    """

    step: int
    position: int
    skipped: tuple[tuple[int, int], ...] = ()
    time: float = 0.0
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    evaluated: bool = True
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)


def list_files(folder: epath.Path) -> list[str]:
    """All files under a step's folder but its manifest, as paths within it, in order."""

    def walk(folder: epath.Path, prefix: str) -> Iterable[str]:
        for path in folder.iterdir():
            if path.is_dir():
                yield from walk(path, f"{prefix}{path.name}/")
            elif prefix or not path.name.startswith(NAME):
                yield f"{prefix}{path.name}"

    return sorted(walk(folder, ""))


def hash_file(path: epath.Path) -> tuple[int, str]:
    """(bytes, hash) of a file."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def hash_files(folder: epath.Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Hashes files of a folder, several at a time."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name), names), strict=True))


def write(folder: epath.Path, manifest: Manifest) -> Manifest:
    """Hashes the files of a step's folder and writes its manifest, whole or not at all.

    Returns:
      the manifest with its `files`.
    """
    manifest = dataclasses.replace(manifest, files=hash_files(folder, list_files(folder)))
    body = {"format": FORMAT, **dataclasses.asdict(manifest)}
    pending = folder / PENDING
    pending.write_text(json.dumps({**body, "hash": _hash(body)}, indent=1, sort_keys=True) + "\n")
    pending.replace(folder / NAME)
    return manifest


def read(folder: epath.Path) -> Manifest:
    """Reads the manifest of a step's folder, and checks that it is as it was written.

    Raises Damaged if there is none, or it has changed; UserError if it cannot be read for a reason that is not its own.
    """
    path = folder / NAME
    with _reading(path):
        text = path.read_bytes()
    try:
        body = json.loads(text)
        expected = body.pop("hash")
        if expected != _hash(body):
            raise Damaged(f"{path} is not as it was written")
        if body.pop("format") != FORMAT:
            raise Damaged(f"{path} is of a newer version of this program")
        body["files"] = {_inside(name): (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
        body["skipped"] = tuple((int(a), int(b)) for a, b in body["skipped"])
        body["metrics"] = {name: float(value) for name, value in body["metrics"].items()}
        body |= {"step": int(body["step"]), "position": int(body["position"]), "time": float(body["time"])}
        return Manifest(**body)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Damaged(f"{path} is not as it was written ({type(e).__name__})") from e


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Around reading: a bad file is damage; what has nothing to do with the file is told to the person."""
    try:
        yield
    except Exception as e:
        if not filesystem.is_refusal(e):
            raise
        where = getattr(e, "filename", None) or path
        if isinstance(e, FileNotFoundError) or getattr(e, "errno", None) in _BAD_FILE:
            raise Damaged(f"{where} is missing or cannot be read ({filesystem.reason(e)})") from e
        raise UserError(
            f"{where} cannot be read ({filesystem.reason(e)}): mend that and start the same command again; nothing was"
            " changed."
        ) from e


def _inside(name: str) -> str:
    """A path within the step's folder, as it is."""
    if {"", ".", ".."} & set(name.split("/")):
        raise ValueError(f"{name!r} is no file of a checkpoint")
    return name


def _hash(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verify(folder: epath.Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Reads files of a step and compares them with the manifest: all of them, or those of `names`.

    Raises Damaged for the first that is missing or different, UserError if one cannot be read for a reason that
    is not its own.
    """
    names = sorted(manifest.files if names is None else names)
    with _reading(folder):
        for name in names:  # what is missing or torn shows without reading anything
            path, size = folder / name, manifest.files[name][0]
            if not path.exists():
                raise Damaged(f"{path} is missing")
            if path.is_dir():
                raise Damaged(f"{path} has become a folder")
            if (length := path.stat().length) != size:
                raise Damaged(f"{path} has {length} bytes instead of {size}")
        hashes = hash_files(folder, names)
    for name in names:
        if hashes[name] != manifest.files[name]:
            raise Damaged(f"{folder / name} does not hold what was written")


def check(folder: epath.Path, share: tuple[int, int] = (0, 1)) -> Manifest:
    """Reads and verifies a step.

    Args:
      folder: the step's folder.
      share: (i, n) verifies only every n-th file, from the i-th: n processes verify all of them together.

    Raises:
      Damaged: if the manifest or a file of the share is not as it was written.
      UserError: if one cannot be read for a reason that is not its own.
    """
    manifest = read(folder)
    if folder.name.isdigit() and manifest.step != int(folder.name):
        raise Damaged(f"{folder} holds step {manifest.step}")
    # By size, so that the shares are about even.
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name][0], name))
    verify(folder, manifest, by_size[share[0] :: share[1]])
    return manifest
