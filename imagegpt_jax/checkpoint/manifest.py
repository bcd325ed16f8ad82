"""The manifest of a checkpoint: which files it has, with the hash of each, and what a run must know to continue.

The hash is XXH3 of 128 bits, which finds every kind of damage at the speed of memory; it is no signature, so a
checkpoint from somebody else is as trustworthy as its sender. The manifest holds a hash of itself.
"""

import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash
from etils import epath

NAME = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 22
_THREADS = min(8, os.cpu_count() or 1)


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
    found, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            size += len(chunk)
    return size, found.hexdigest()


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
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(json.dumps({**body, "hash": _hash(body)}, indent=1, sort_keys=True) + "\n")
    temporary.replace(folder / NAME)
    return manifest


def read(folder: epath.Path) -> Manifest:
    """Reads the manifest of a step's folder, and checks that it is as it was written.

    Raises:
      Damaged: if there is none, or it has changed.
    """
    path = folder / NAME
    try:
        text = path.read_bytes()
    except OSError as e:
        raise Damaged(f"{path} is missing or cannot be read: the step was not finished") from e
    try:
        body = json.loads(text)
        expected = body.pop("hash")
        if expected != _hash(body):
            raise Damaged(f"{path} is not as it was written")
        if body.pop("format") != FORMAT:
            raise Damaged(f"{path} is of a newer version of this program")
        body["files"] = {name: (int(size), digest) for name, (size, digest) in body["files"].items()}
        body["skipped"] = tuple((int(a), int(b)) for a, b in body["skipped"])
        return Manifest(**body)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Damaged(f"{path} is not as it was written ({type(e).__name__})") from e


def _hash(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verify(folder: epath.Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Reads files of a step and compares them with the manifest: all of them, or those of `names`.

    Raises:
      Damaged: for the first that is missing or different.
    """
    names = sorted(manifest.files if names is None else names)
    for name in names:  # what is missing or torn shows without reading anything
        path, size = folder / name, manifest.files[name][0]
        if not path.exists():
            raise Damaged(f"{path} is missing")
        if path.is_dir() or (found := path.stat().length) != size:
            raise Damaged(f"{path} has {'become a folder' if path.is_dir() else f'{found} bytes instead of {size}'}")
    try:
        hashes = hash_files(folder, names)
    except OSError as e:
        raise Damaged(f"{e.filename or folder} cannot be read ({e.strerror or e})") from e
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
    """
    manifest = read(folder)
    if manifest.step != (int(folder.name) if folder.name.isdigit() else manifest.step):
        raise Damaged(f"{folder} holds step {manifest.step}")
    # By size, so that the shares are about even.
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name][0], name))[share[0] :: share[1]]
    verify(folder, manifest, names)
    return manifest
