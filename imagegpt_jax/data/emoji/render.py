"""Draws the set at a resolution, once, and keeps the PNGs in the user's cache folder.

A cache file is a plain zip of stored (not deflated) PNGs, one per picture of a style in the order of its rows: any
tool opens it, and a picture is one slice of the mapped file.
"""

import hashlib
import importlib.metadata
import mmap
import os
import queue
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from imagegpt_jax.data.emoji import catalog
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import filesystem, progress

# Part of the cache key: raise it when worker.py or svg_document give other pixels for the same drawing.
_RENDERING = 1
_WORKER = Path(__file__).with_name("worker.py")
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip entry: only the lengths of name and extra field matter here


def svg_document(picture: catalog.Picture, body: str, res: int) -> str:
    """Returns an SVG document of res x res pixels; a view box that is not square is fitted and centred."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{res}" height="{res}" viewBox="0 0 {picture.width} {picture.height}">{body}</svg>'
    )


def renderer_version() -> str:
    """Returns what, apart from the drawings and the resolution, decides the pixels."""
    return f"{_RENDERING} resvg_py {importlib.metadata.version('resvg_py')}"


def _ask(idle: "queue.SimpleQueue[subprocess.Popen[bytes]]", document: str) -> bytes:
    worker = idle.get()
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(document.encode() + b"\n")
        worker.stdin.flush()
        return worker.stdout.read(struct.unpack("<I", worker.stdout.read(4))[0])
    except (OSError, struct.error) as e:
        raise RuntimeError("a process that draws the built-in pictures ended early; its error is above") from e
    finally:
        idle.put(worker)


def render(documents: Sequence[str]) -> Iterator[bytes]:
    """Yields the PNG of each SVG document, drawn by one process per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # -P: the script's own folder stays off the path, where its neighbours could hide other modules.
    command = [sys.executable, "-P", str(_WORKER)]
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    workers = []
    executor = ThreadPoolExecutor(cores)
    try:
        for _ in range(min(cores, len(documents))):
            # A session of their own: Ctrl-C is for the caller, which ends them.
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            workers.append(worker)
            idle.put(worker)
        yield from executor.map(lambda d: _ask(idle, d), documents)
    finally:
        executor.shutdown(cancel_futures=True)
        for worker in workers:
            worker.kill()
            worker.communicate()


def _write_zip(path: Path, names: Iterable[str], pngs: Iterable[bytes]) -> None:
    """Writes the archive; readers and other writers only ever see a complete file."""
    try:
        with filesystem.replacing(path, shared=True) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, png in zip(names, pngs, strict=True):
                archive.writestr(zipfile.ZipInfo(name), png)
    except OSError as e:
        raise UserError(
            f"rendered pictures cannot be kept in {path.parent} ({e.strerror}): set IMAGEGPT_JAX_CACHE to a folder"
            " that can be written."
        ) from e


class Archive:
    """The PNGs of one style at one resolution: `archive[row]` is bytes. Reading is thread-safe and survives a fork."""

    def __init__(self, path: Path):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self._entries = archive.infolist()
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, row: int) -> bytes:
        entry = self._entries[row]
        name_length, extra_length = _LOCAL_HEADER.unpack_from(self._data, entry.header_offset)
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        png = self._data[start : start + entry.file_size]
        if zlib.crc32(png) != entry.CRC:
            raise UserError(f"{self.path} is damaged: delete it, and it will be made again.")
        return png


def open_archive(style: str, res: int) -> Archive:
    """Returns the pictures of a style at res x res pixels, drawing them first if this was never done here.

    Raises:
      UserError: when the cache folder cannot be written.
    """
    key = f"{catalog.drawings_sha256(style)} {renderer_version()}"
    path = filesystem.cache_dir() / "emoji" / f"{style}-{res}px-{hashlib.sha256(key.encode()).hexdigest()[:12]}.zip"
    rows = [p for p in catalog.pictures() if p.style == style]
    rows.sort(key=lambda p: p.row)
    if path.is_file():
        try:
            archive = Archive(path)
        except (zipfile.BadZipFile, ValueError):
            archive = None
        if archive is not None and len(archive) == len(rows):
            return archive
    documents = [svg_document(p, body, res) for p, body in zip(rows, catalog.drawings(style), strict=True)]
    about = {"total": len(rows), "desc": f"Drawing {style} emoji at {res} px", "unit": "picture"}
    _write_zip(path, (f"{p.concept}.png" for p in rows), progress.bar(render(documents), **about))
    return Archive(path)
