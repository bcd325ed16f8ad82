"""Our packed format: ArrayRecord shards of msgpack records, with a `dataset.json` beside them. Reader and writer.

A data set is a folder of `NAME-00000-of-00012.array_record` files. A record is a msgpack map:

    "id": str
    "image": bytes          the encoded image, as it was (JPEG, PNG, WebP, ...)
    "captions": [str, ...]  any number of them
    "label": int            index into dataset.json's "label_names"
    "codes": bytes          token shards: little-endian unsigned integers, row by row; 2 or 4 bytes each
    "grid": [rows, columns] of the codes

each key being there only if the data set has it. Records are stored one per chunk, uncompressed (images already are),
so that any one of them is read with one seek. `dataset.json` is written last: a folder without it was not finished.
"""

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import msgpack
import numpy as np
from etils import epath

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import filesystem

SIDECAR = "dataset.json"
PLAN = "plan.json"
SUFFIX = ".array_record"
FORMAT = "imagegpt_jax/1"
_SPECS = {"images": "array_record", "tokens": "tokens"}  # kind -> how `sources.open_source` calls it


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Record dict -> msgpack bytes. Codes are stored in 2 bytes each if they all fit, else in 4."""
    out: dict[str, Any] = {"id": str(record["id"])}
    if "image" in record:
        out["image"] = bytes(record["image"])
    if "captions" in record:
        out["captions"] = [str(c) for c in record["captions"]]
    if "label" in record:
        out["label"] = int(record["label"])
    if "codes" in record:
        codes = np.asarray(record["codes"]).reshape(-1)
        rows, columns = (int(n) for n in record["grid"])
        if codes.size != rows * columns or codes.size == 0 or codes.min() < 0:
            raise ValueError(f"record {out['id']}: {codes.size} codes do not fill a grid of {rows} x {columns}")
        out["codes"] = codes.astype("<u2" if codes.max() < 2**16 else "<u4").tobytes()
        out["grid"] = [rows, columns]
    # A caption from the wild may hold half a surrogate pair, which UTF-8 cannot say.
    return cast(bytes, msgpack.packb(out, unicode_errors="replace"))


def decode_record(data: bytes) -> dict[str, Any]:
    """Msgpack bytes -> record dict, with "codes" as int32 [rows * columns] and "grid" as a tuple."""
    record = msgpack.unpackb(data, unicode_errors="replace")
    if "codes" in record:
        rows, columns = record["grid"]
        width = len(record["codes"]) // (rows * columns)
        record["codes"] = np.frombuffer(record["codes"], f"<u{width}").astype(np.int32)
        record["grid"] = (rows, columns)
    return record


def shard_ranges(num_records: int, shard_size: int) -> list[tuple[int, int]]:
    """Cuts range(num_records) into shards of nearly equal size, none above `shard_size`; (start, stop) of each."""
    if shard_size < 1:
        raise UserError(f"a shard holds at least one record: shard_size={shard_size} should be 1 or more.")
    count = max(1, -(-num_records // shard_size))
    cuts = [num_records * i // count for i in range(count + 1)]
    return list(itertools.pairwise(cuts))


class ShardWriter:
    """Writes one data set, shard by shard; any shard by any process, and again after an interruption.

    Every shard appears whole or not at all (written under another name, then renamed), with a small JSON file beside it
    that says it is complete. `finish` gathers those into `dataset.json`.
    """

    def __init__(
        self, folder: epath.PathLike, name: str, ranges: Sequence[tuple[int, int]], *, kind: str, made_from: str
    ):
        """Starts or continues writing into `folder`.

        Args:
          folder: made if it is not there.
          name: first part of the file names.
          ranges: (start, stop) of the records of each shard, as `shard_ranges` gives.
          kind: "images" or "tokens".
          made_from: what identifies the input and how it is processed; continuing with another one is an error.

        Raises:
          UserError: if the folder holds a finished data set, or the beginning of another one.
        """
        self.folder, self.name, self.ranges, self.kind = epath.Path(folder), name, list(ranges), kind
        plan = {"name": name, "kind": kind, "made_from": made_from, "ranges": [list(r) for r in self.ranges]}
        if (self.folder / SIDECAR).exists():
            raise UserError(f"{self.folder} already holds a data set: give another folder, or delete this one.")
        if (self.folder / PLAN).exists():
            if json.loads((self.folder / PLAN).read_text()) != plan:
                raise UserError(
                    f"{self.folder} holds the beginning of another data set: give the same input and settings to"
                    " continue it, or another folder."
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            filesystem.write_whole(self.folder / PLAN, json.dumps(plan))

    def path(self, shard: int) -> epath.Path:
        """Where shard number `shard` is, or will be."""
        return self.folder / f"{self.name}-{shard:05d}-of-{len(self.ranges):05d}{SUFFIX}"

    def is_finished(self, shard: int) -> bool:
        """Whether an earlier run, or another process, has written this shard completely."""
        return self._note(shard).exists() and self.path(shard).exists()

    def _note(self, shard: int) -> epath.Path:
        return self.folder / f"{self.path(shard).name}.json"

    def write(self, shard: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes one shard from its records, in order; on an error nothing of it is left.

        Raises:
          ValueError: if there are more or fewer records than the shard's range has.
        """
        start, stop = self.ranges[shard]
        digest, count = hashlib.sha256(), 0
        with filesystem.replacing(self.path(shard)) as temporary:
            writer = _array_record().ArrayRecordWriter(os.fspath(temporary), "group_size:1,uncompressed")
            try:
                for record in records:
                    data = encode_record(record)
                    digest.update(len(data).to_bytes(8, "little") + data)
                    writer.write(data)
                    count += 1
                writer.close()
                if count != stop - start:
                    raise ValueError(f"shard {shard} has {count} records where {stop - start} were planned")
            except BaseException:
                with contextlib.suppress(Exception):
                    writer.close()
                raise
        note = {"file": self.path(shard).name, "records": count, "sha256": digest.hexdigest()}
        filesystem.write_whole(self._note(shard), json.dumps(note))

    def abandon(self, *, keep_finished: bool) -> None:
        """Cleans up after an error.

        Args:
          keep_finished: whether finished shards stay, for the same command to continue; if not, or if there are none,
            nothing that was written is left.
        """
        shards = range(len(self.ranges))
        if keep_finished and any(self.is_finished(i) for i in shards):
            return
        for path in (*map(self.path, shards), *map(self._note, shards), self.folder / PLAN):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there were other files in it
            self.folder.rmdir()

    def finish(self, *, label_names: Sequence[str] = (), **facts: Any) -> dict[str, Any]:
        """Writes `dataset.json` and removes the notes; call it once, when every shard is finished.

        Args:
          label_names: names of the labels, if records have labels.
          **facts: more about the data set: `tokenizer` (fingerprint), `num_codes`, `grid` for token shards, `source`.

        Returns:
          What was written.

        Raises:
          ValueError: if a shard is missing.
        """
        missing = [i for i in range(len(self.ranges)) if not self.is_finished(i)]
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.ranges)} shards are missing, the first is {missing[0]}")
        shards = [json.loads(self._note(i).read_text()) for i in range(len(self.ranges))]
        # The fingerprint is of the records alone, not of how they are cut into files or named.
        about = {
            "format": FORMAT,
            "kind": self.kind,
            "num_records": sum(s["records"] for s in shards),
            "label_names": list(label_names),
            "fingerprint": hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest()[:16],
            **facts,
            "shards": shards,
        }
        filesystem.write_whole(self.folder / SIDECAR, json.dumps(about, indent=1) + "\n")
        for i in range(len(self.ranges)):
            self._note(i).unlink()
        (self.folder / PLAN).unlink()
        return about


class ShardSource:
    """Random access over all shards of a data set.

    Attributes:
      name: kind and folder.
      label_names: names of the labels, may be empty.
      fingerprint: content id.
      info: the whole of `dataset.json` (empty for bare shards given by a pattern).
    """

    def __init__(self, pattern: str, *, kind: str = "images"):
        """Opens a folder with a `dataset.json`, or the files that match a pattern such as `/data/train-*.array_record`.

        Raises:
          UserError: if there is no such folder or file, packing was not finished, a shard is missing or not an
            ArrayRecord file, or the data set is of another kind.
        """
        spec, self._kind = _SPECS[kind], kind
        folder = epath.Path(pattern).expanduser()
        self.info: dict[str, Any] = {}
        if folder.is_dir():
            self.info = _read_info(folder, kind)
            self.paths = [folder / s["file"] for s in self.info["shards"]]
            counts = [s["records"] for s in self.info["shards"]]
            gone = [p.name for p in self.paths if not p.exists()]
            if gone:
                raise UserError(f"{folder} lacks {len(gone)} shards, the first is {gone[0]}: copy or pack it again.")
        else:
            if not folder.parent.exists():
                raise UserError(f"there is no folder {folder.parent}: give {spec}:FOLDER or {spec}:FOLDER/*{SUFFIX}.")
            self.paths = sorted(folder.parent.glob(folder.name))
            if not self.paths:
                raise UserError(f"no file matches {pattern}: give {spec}:FOLDER or {spec}:FOLDER/*{SUFFIX}.")
            counts = [_open(p).num_records() for p in self.paths]
            with contextlib.suppress(FileNotFoundError):
                self.info = {"label_names": json.loads((folder.parent / SIDECAR).read_text())["label_names"]}
        self.name = f"{spec}:{pattern}"
        self.label_names = tuple(self.info.get("label_names", ()))
        self._stops = np.cumsum(counts).tolist()
        self._starts = [0, *self._stops[:-1]]
        if not self._stops[-1]:
            raise UserError(f"{pattern} holds no records: pack a data set that is not empty.")
        files = "".join(f"{p.name}:{c}:{p.stat().length}" for p, c in zip(self.paths, counts, strict=True))
        self.fingerprint = self.info.get("fingerprint") or hashlib.sha256(files.encode()).hexdigest()[:16]
        self._readers: list[Any] = [None] * len(self.paths)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._stops[-1]

    @functools.cached_property
    def names(self) -> list[str] | None:
        """Ids of all records of token shards; None for pictures, which would have to be read whole."""
        if self._kind != "tokens":
            return None
        starts = range(0, len(self), 1024)
        read = (self.__getitems__(range(start, min(start + 1024, len(self)))) for start in starts)
        return [str(record["id"]) for records in read for record in records]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads records by their numbers, shard by shard, and returns them in the order asked for."""
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)}")
            shard = bisect.bisect_right(self._stops, index)
            by_shard.setdefault(shard, []).append((place, int(index) - self._starts[shard]))
        out: list[Any] = [None] * len(indices)
        for shard, places in by_shard.items():
            try:
                data = self._reader(shard).read([within for _, within in places])
                for (place, _), record in zip(places, data, strict=True):
                    out[place] = decode_record(record)
            except RuntimeError as e:  # checksums do not match
                raise UserError(f"{self.paths[shard]} is damaged ({e}): copy or pack it again.") from e
            except (ValueError, TypeError, KeyError, msgpack.UnpackException) as e:
                raise UserError(
                    f"{self.paths[shard]} holds a record that is not in this package's format: pack the data with"
                    " `imagegpt-jax pack` (a prepared TFDS set is opened with tfds:NAME)."
                ) from e
        return out

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if self._readers[shard] is None:
                self._readers[shard] = _open(self.paths[shard])
            return self._readers[shard]


def _read_info(folder: epath.Path, kind: str) -> dict[str, Any]:
    try:
        info = json.loads((folder / SIDECAR).read_text())
    except FileNotFoundError:
        if (folder / PLAN).exists():
            raise UserError(f"{folder} was not finished: run the command that was writing it again.") from None
        raise UserError(
            f"{folder} holds no {SIDECAR}: make it with `imagegpt-jax pack`, or name the files by a pattern such as"
            f" {folder}/*{SUFFIX}."
        ) from None
    except ValueError as e:
        raise UserError(f"{folder / SIDECAR} is not JSON ({e}): pack the data set again.") from e
    if info.get("format") != FORMAT:
        raise UserError(f"{folder / SIDECAR} has format {info.get('format')!r}, expected {FORMAT!r}: pack it again.")
    if info["kind"] != kind:
        raise UserError(f"{folder} holds {info['kind']}, not {kind}: write {_SPECS[info['kind']]}:{folder}.")
    return info


def _array_record() -> Any:
    from array_record.python import array_record_module  # type: ignore[attr-defined]  # compiled, without types

    return array_record_module


def _open(path: epath.Path) -> Any:
    # No read-ahead: reads are random. The buffer is what one small record needs.
    reader = _array_record().ArrayRecordReader(
        os.fspath(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768
    )
    if not reader.ok():
        raise UserError(f"{path} is missing or not a whole ArrayRecord file: copy or pack it again.")
    return reader
