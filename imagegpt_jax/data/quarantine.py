"""Bad records: detected, listed once with the reason, and replaced by the record of the next position.

Whether a record is bad follows from its bytes and the ops alone, so every run, host and resumption replaces the same
ones. Refused are, besides what cannot be read or decoded, pictures that are probably not what they seem: of four colour
channels (CMYK), of 16 bits, animated, one pixel thin or a hundred times longer than wide, larger than 2^27 pixels, of
another format than the file's name says; and captions that are not UTF-8 or longer than 64 KiB. `accept` lets kinds
through that decode to something sensible.

Shape suffixes: B rows of a batch on this host.
"""

import collections
import contextlib
import functools
import io
import json
import pathlib
import re
import struct
import threading
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from imagegpt_jax.data.images import FORMATS
from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.runtime import filesystem

# What `accept` may name: these decode, each to one picture.
KINDS = ("cmyk", "16-bit", "animated", "extension", "thin")
MAX_PIXELS = 1 << 26  # a translucent picture takes 26 bytes of each while it is decoded: 1.8 GB
MAX_CAPTION_BYTES = 1 << 16
_LONGEST = 100  # times the shorter side
# Records that must have been drawn before their share of bad ones says anything.
_ENOUGH = 256
_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
}
_TRAITS = {"cmyk": "four colour channels (CMYK)", "16-bit": "16 bits per channel", "animated": "an animation"}
_KNOWN_EXTENSIONS = {extension for group in _EXTENSIONS.values() for extension in group}


class Quarantine:
    """The bad records of one source.

    Args:
      max_share: above this share of bad ones among the records drawn, the run stops.
      accept: kinds of `KINDS` that are let through.
      report: called once for each bad record, with its id and the reason.

    Raises:
      UserError: if `accept` names something else.
    """

    def __init__(
        self, max_share: float = 0.1, accept: Collection[str] = (), report: Callable[[str, str], None] | None = None
    ):
        for kind in accept:
            if kind not in KINDS:
                raise UserError(f"config.data.quarantine.accept has {kind!r}.{suggest(kind, KINDS)}")
        self._max_share, self._accept, self._report = max_share, frozenset(accept), report
        self._reasons: dict[int, tuple[str, str]] = {}
        self._drawn = self._refused = 0
        self._lock = threading.Lock()

    def fetch(
        self, source: Any, order: Callable[[np.ndarray], np.ndarray], position_B: np.ndarray
    ) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
        """Reads the records at global positions, each bad one replaced by the next position's that is not.

        Returns:
          (records, their numbers [B], which of them stand at their own position [B])

        Raises:
          UserError: if too many records are bad.
        """
        _, first = np.unique(position_B, return_index=True)  # what fills up a last batch is one example
        position_B = position_B.copy()
        records: list[Any] = [None] * len(position_B)
        index_B = np.zeros(len(position_B), np.int64)
        left = np.arange(len(position_B))
        own_B = np.ones(len(position_B), bool)
        while len(left):
            index_B[left] = order(position_B[left])
            fetched = self._read(source, index_B[left].tolist())
            for row, record in zip(left.tolist(), fetched, strict=True):
                records[row] = record
            left = np.array([row for row in left.tolist() if records[row] is None], np.int64)
            own_B[left] = False
            position_B[left] += 1
        self._count(len(first), int((~own_B[first]).sum()))
        return records, index_B, own_B

    def _read(self, source: Any, indices: list[int]) -> list[dict[str, Any] | None]:
        """Records by number; None for the bad ones."""
        wanted = sorted({i for i in indices if i not in self._reasons})
        try:
            read = dict(zip(wanted, source.__getitems__(wanted), strict=True)) if wanted else {}
        except (UserError, OSError, RuntimeError):  # one of them: which?
            read = {}
            for index in wanted:
                try:
                    read[index] = source.__getitems__([index])[0]
                except (UserError, OSError, RuntimeError) as e:
                    self.add(index, f"record {index} of {source.name}", " ".join(str(e).split()))
        for index, record in list(read.items()):
            if reason := refuse(record, self._accept):
                self.add(index, str(record["id"]), reason)
                del read[index]
        return [read.get(i) for i in indices]

    def add(self, index: int, name: str, reason: str) -> None:
        """Notes that a record is bad, and reports it unless it was before."""
        with self._lock:
            known = index in self._reasons
            self._reasons[index] = (name, reason)
        if not known and self._report is not None:
            self._report(name, reason)

    def _count(self, drawn: int, refused: int) -> None:
        with self._lock:
            self._drawn += drawn
            self._refused += refused
            if self._drawn < _ENOUGH or self._refused <= self._max_share * self._drawn:
                return
            share = self._refused / self._drawn
            reasons = list(self._reasons.values())
        kinds = collections.Counter(re.split(r"[:(]", reason)[0].strip() for _, reason in reasons)
        name, reason = reasons[0]
        shown = "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5))
        raise UserError(
            f"{share:.0%} of the first {self._drawn} examples are bad ({shown}; the first is {name}: {reason}): clean"
            " the data, let kinds of them through with --config.data.quarantine.accept, or raise"
            f" --config.data.quarantine.max_share={self._max_share:g}."
        )


class Report:
    """`quarantine.jsonl` of a workdir: one line {"source", "id", "reason"} for each bad record, whichever run met it.

    Args:
      workdir: the run's folder.
      process: number of this process; each writes a file of its own.
      log: a `runtime.event_log.Log`.
    """

    def __init__(self, workdir: epath.PathLike, process: int, log: Any):
        folder, self._log, self._lock = epath.Path(workdir), log, threading.Lock()
        self._path = folder / ("quarantine.jsonl" if process == 0 else f"quarantine.process-{process}.jsonl")
        self._listed: set[tuple[str, str]] = set()
        for path in folder.glob("quarantine*.jsonl"):
            for line in path.read_bytes().decode("utf-8", "replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off by a kill: will be listed again
                    fields = json.loads(line)
                    self._listed.add((fields["source"], fields["id"]))

    def __call__(self, source: str, name: str, reason: str) -> None:
        """Lists a record, unless it is."""
        with self._lock:
            if (source, name) in self._listed:
                return
            self._listed.add((source, name))
            with filesystem.writing(self._path), self._path.open("a") as file:
                file.write(json.dumps({"source": source, "id": name, "reason": reason}) + "\n")
        self._log.write("quarantine", source=source, id=name, reason=reason)


# ------------------------------------------------------------------------------------------------ looking at a record


def refuse(record: dict[str, Any], accept: Collection[str] = ()) -> str | None:
    """Why a record is not to be trained on, judged by its captions and the header of its picture; None if it may be."""
    for caption in record.get("captions", ()):
        if reason := refuse_caption(caption):
            return reason
    return _refuse_image(record["image"], str(record["id"]), accept) if "image" in record else None


def refuse_caption(caption: str) -> str | None:
    """Why a caption is not to be trained on; None if it may be."""
    size = len(caption.encode("utf-8", "replace"))
    # U+FFFD is what a reader puts in place of bytes that are no UTF-8; half a surrogate pair is what JSON lets through.
    if "\ufffd" in caption or any("\ud800" <= c <= "\udfff" for c in caption[:MAX_CAPTION_BYTES]):
        return "a caption that is not UTF-8"
    return f"a caption of {size} bytes: at most {MAX_CAPTION_BYTES}" if size > MAX_CAPTION_BYTES else None


def _refuse_image(data: bytes, name: str, accept: Collection[str]) -> str | None:
    try:
        form, width, height, traits = _header(data)
    except UnidentifiedImageError:
        return "not a sound image: of no known format"
    except Exception as e:  # Pillow raises whatever damaged bytes make it stumble over
        return f"not a sound image: {' '.join(str(e).split()) or type(e).__name__}"
    if width * height > MAX_PIXELS:
        return f"a decompression bomb: {width} x {height} pixels, at most {MAX_PIXELS}"
    if traits.get("truncated"):
        return f"a truncated image: the end of its {form} is missing"
    for kind, words in _TRAITS.items():
        if traits.get(kind) and kind not in accept:
            return words
    if "thin" not in accept and (min(width, height) < 2 or max(width, height) > _LONGEST * min(width, height)):
        return f"a thin image: {width} x {height} pixels"
    extension = pathlib.PurePosixPath(name).suffix.lower()
    if "extension" not in accept and extension in _KNOWN_EXTENSIONS and extension not in _EXTENSIONS.get(form, ()):
        return f"a wrong extension: the file is {form} and not {extension}"
    return None


def _header(data: bytes) -> tuple[str, int, int, dict[str, bool]]:
    """(format, width, height, traits), without decoding; of PNG and JPEG without Pillow, which takes longer."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        width, height, depth = struct.unpack(">IIB", data[16:25])
        traits = {"16-bit": depth == 16, "animated": b"acTL" in data[33:1024], "truncated": b"IEND" not in data[-64:]}
        return "PNG", width, height, traits
    if data[:3] == b"\xff\xd8\xff":
        height, width, channels, depth = _jpeg_frame(data)
        traits = {"cmyk": channels == 4, "16-bit": depth > 8, "truncated": data.rfind(b"\xff\xd9") <= 0}
        return "JPEG", width, height, traits
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        traits = {"cmyk": image.mode == "CMYK", "16-bit": image.mode.startswith(("I", "F"))}
        traits["animated"] = getattr(image, "n_frames", 1) > 1
        return str(image.format), image.width, image.height, traits


def _jpeg_frame(data: bytes) -> tuple[int, int, int, int]:
    """(height, width, channels, bits) of the frame header of a JPEG (ITU-T T.81, B.2.2)."""
    place = 2
    while place + 9 < len(data):
        if data[place] != 0xFF:
            raise ValueError("a damaged JPEG header")
        marker = data[place + 1]
        if marker == 0xFF:  # fill bytes
            place += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            depth, height, width, channels = struct.unpack(">BHHB", data[place + 4 : place + 10])
            return height, width, channels, depth
        alone = marker == 0x01 or 0xD0 <= marker <= 0xD8  # without a length and data
        place += 2 if alone else 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    raise ValueError("a JPEG without a picture")


def attach(sources: dict[str, Any], policy: Any, report: Report) -> None:
    """Gives opened sources a quarantine each, by the policy of `config.data.quarantine`."""
    for source in sources.values():
        listed = functools.partial(report, source.name)
        source.quarantine = Quarantine(policy.max_share, tuple(policy.accept), listed)
