"""What can be packed: folders, webdataset tars, parquet files and prepared TFDS sets, as a known number of records.

A record is what an ArrayRecord shard of pictures holds: {"id", "image": encoded bytes, "captions" or "label"}.
"""

import bisect
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any, Protocol

from etils import epath

from imagegpt_jax import errors
from imagegpt_jax.data.folder import FolderSource
from imagegpt_jax.data.images import EXTENSIONS
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import progress

Record = dict[str, Any]
CAPTIONS = ("captions", "caption", "text", "txt")
IMAGES = ("image", "img", "image_bytes", "bytes", *(e[1:] for e in EXTENSIONS))


class Input(Protocol):
    """Something to pack: a known number of records, readable from any one on."""

    label_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Yields records start to stop, in order."""
        ...


class FolderInput:
    """An image folder; see `imagegpt_jax.data.folder`."""

    def __init__(self, path: str):
        self._source = FolderSource(path)
        self.label_names, self.fingerprint = self._source.label_names, self._source.fingerprint
        print(self._source.describe())

    def __len__(self) -> int:
        return len(self._source)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Yields records start to stop."""
        for i in range(start, stop):
            yield from self._source.__getitems__([i])


class TarInput:
    """Webdataset tar files: the headers are read at once, the contents when they are packed."""

    def __init__(self, paths: list[epath.Path]):
        self._samples: list[tuple[epath.Path, str, dict[str, tarfile.TarInfo]]] = []
        classes: set[int] = set()
        for path in progress.bar(paths, "Reading tar headers", unit="file", leave=False):
            groups: dict[str, dict[str, tarfile.TarInfo]] = {}
            try:
                with tarfile.open(path) as tar:
                    for member in tar:
                        folder, _, file = member.name.rpartition("/")
                        stem, _, extension = file.partition(".")
                        if member.isfile() and stem and extension:
                            groups.setdefault(f"{folder}/{stem}" if folder else stem, {})[extension.lower()] = member
                            if extension.lower() == "cls":
                                classes.add(_class_number(_member(tar, member), f"{member.name} in {path}"))
            except (tarfile.TarError, EOFError, OSError) as e:
                raise UserError(f"{path} is not a whole tar file ({e}): copy it again, or leave it out.") from e
            self._samples += [(path, key, group) for key, group in groups.items() if _image_key(group)]
        if not self._samples:
            raise UserError(
                f"no sample in {paths[0]} and the others has an image: files such as 000.jpg, 000.txt are expected."
            )
        self.label_names = tuple(str(i) for i in range(max(classes) + 1)) if classes else ()
        facts = [(p.name, key, {e: m.size for e, m in group.items()}) for p, key, group in self._samples]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode("utf-8", "replace")).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._samples)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Yields samples start to stop; one tar file is open at a time."""
        tar, opened = None, None
        try:
            for path, key, group in self._samples[start:stop]:
                if path != opened or tar is None:
                    if tar is not None:
                        tar.close()
                    tar, opened = tarfile.open(path), path  # noqa: SIM115
                yield self._record(tar, key, group)
        finally:
            if tar is not None:
                tar.close()

    def _record(self, tar: tarfile.TarFile, key: str, group: dict[str, tarfile.TarInfo]) -> Record:
        record: Record = {"id": key, "image": _member(tar, group[_image_key(group)])}
        captions: list[str] = []
        for extension in ("txt", "caption"):
            if extension in group:
                text = _member(tar, group[extension]).decode("utf-8-sig", "replace")
                captions += [line.strip() for line in text.splitlines() if line.strip()]
        if "json" in group:
            try:
                about = json.loads(_member(tar, group["json"]))
            except ValueError as e:
                raise UserError(f"{group['json'].name} in {tar.name} is not JSON ({e}): correct or remove it.") from e
            if isinstance(about, dict) and not captions:
                captions = _texts(next((about[c] for c in CAPTIONS if c in about), None))
        if captions or {"txt", "caption", "json"} & set(group):
            record["captions"] = captions
        if "cls" in group:
            record["label"] = _class_number(_member(tar, group["cls"]), group["cls"].name)
        return record


class ParquetInput:
    """Parquet files with a column of encoded images."""

    def __init__(self, paths: list[epath.Path]):
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError as e:
            raise UserError("reading parquet needs pyarrow: pip install 'imagegpt_jax[parquet]'.") from e
        self._parquet = parquet
        self._groups: list[tuple[epath.Path, int]] = []
        self._stops: list[int] = []
        total = 0
        for path in paths:
            try:
                with parquet.ParquetFile(path) as file:
                    schema, metadata = file.schema_arrow, file.metadata
            except (arrow.ArrowInvalid, OSError) as e:
                raise UserError(f"{path} is not a whole parquet file ({e}): copy it again, or leave it out.") from e
            for group in range(metadata.num_row_groups):
                total += metadata.row_group(group).num_rows
                self._groups.append((path, group))
                self._stops.append(total)
            if path == paths[0]:
                self._find_columns(path, schema)
        if not total:
            raise UserError(f"{paths[0]} and the others have no rows: give files that have some.")
        self.fingerprint = hashlib.sha256(
            json.dumps([(p.name, p.stat().length) for p in paths] + [self._columns]).encode()
        ).hexdigest()[:16]
        if "label" in self._columns and not self.label_names:
            self._count_classes(paths)

    def _find_columns(self, path: epath.Path, schema: Any) -> None:
        lower = {name.lower(): name for name in reversed(schema.names)}
        find = {"image": IMAGES, "captions": CAPTIONS, "label": ("label", "labels", "cls")}
        columns = {kind: next((lower[n] for n in names if n in lower), None) for kind, names in find.items()}
        if columns["image"] is None:
            raise UserError(
                f"{path} has the columns {', '.join(schema.names)}: call the column of encoded images image."
            )
        self._columns = {kind: name for kind, name in columns.items() if name is not None}
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = about.get("info", {}).get("features", {}).get(self._columns.get("label", ""), {})
        self.label_names: tuple[str, ...] = tuple(feature.get("names", ()))

    def _count_classes(self, paths: list[epath.Path]) -> None:
        largest = -1
        for path in paths:
            column = self._parquet.read_table(path, columns=[self._columns["label"]]).column(0).to_pylist()
            if not all(v is None or isinstance(v, int) for v in column):
                raise UserError(f"{path}: column {self._columns['label']} holds no class numbers: use whole numbers.")
            largest = max([largest, *(v for v in column if v is not None)])
        self.label_names = tuple(str(i) for i in range(largest + 1))

    def __len__(self) -> int:
        return self._stops[-1]

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Yields rows start to stop, a row group at a time."""
        first = bisect.bisect_right(self._stops, start)
        for number in range(first, len(self._groups)):
            begin = self._stops[number - 1] if number else 0
            if begin >= stop:
                return
            path, group = self._groups[number]
            with self._parquet.ParquetFile(path) as file:
                table = file.read_row_group(group, columns=list(self._columns.values()))
            table = table.slice(max(0, start - begin), min(stop, self._stops[number]) - max(start, begin))
            for row, values in enumerate(table.to_pylist(), max(start, begin)):
                yield self._record(row, values, path)

    def _record(self, row: int, values: dict[str, Any], path: epath.Path) -> Record:
        image = values[self._columns["image"]]
        name = f"{row:09d}"
        if isinstance(image, dict):
            name, image = image.get("path") or name, image.get("bytes")
        if not isinstance(image, bytes):
            raise UserError(
                f"{path}, row {row - self._row_of(path)}: column {self._columns['image']} holds no image bytes: use"
                " files with the images inside, not links to them."
            )
        record: Record = {"id": name, "image": image}
        if "captions" in self._columns:
            record["captions"] = _texts(values[self._columns["captions"]])
        if "label" in self._columns:
            label = values[self._columns["label"]]
            record["label"] = -1 if label is None else int(label)
        return record

    def _row_of(self, path: epath.Path) -> int:
        number = next(i for i, (p, _) in enumerate(self._groups) if p == path)
        return self._stops[number - 1] if number else 0


class TfdsInput:
    """A prepared TFDS set, in whatever file format, read in the order of its files."""

    def __init__(self, name: str, split: str, data_dir: str | None):
        from imagegpt_jax.data.ops import import_tf
        from imagegpt_jax.data.tfds_source import TfdsExamples, import_tfds, open_builder

        import_tf()
        self._tfds = import_tfds()
        self._builder = open_builder(name, data_dir)
        self._split = split
        if split not in self._builder.info.splits:
            raise UserError(f"{name} has no split {split!r}.{errors.suggest(split, self._builder.info.splits)}")
        self._examples = TfdsExamples(self._builder)
        self.label_names = self._examples.label_names
        info = self._builder.info
        self._count = info.splits[split].num_examples
        self.fingerprint = f"{info.full_name} {split} {list(info.splits[split].shard_lengths)}"

    def __len__(self) -> int:
        return self._count

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Yields examples start to stop; without interleaving, so that the order is that of the files."""
        dataset = self._builder.as_dataset(
            split=f"{self._split}[{start}:{stop}]",
            decoders=self._examples.decoders(),
            read_config=self._tfds.ReadConfig(interleave_cycle_length=1),
            shuffle_files=False,
        )
        for number, example in enumerate(self._tfds.as_numpy(dataset), start):
            yield self._examples.record(example, number)


def _image_key(group: dict[str, Any]) -> str:
    return next((e for e in group if f".{e.rsplit('.', 1)[-1]}" in EXTENSIONS), "")


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""


def _class_number(data: bytes, where: str) -> int:
    if not re.fullmatch(rb"\s*\d+\s*", data):
        raise UserError(f"{where} holds {data[:20]!r} where a class number was expected: write 0, 1, ...")
    return int(data)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(v) for v in values if v is not None]


def open_input(pattern: str) -> Input:
    """Opens a folder, or all files that match a pattern.

    Raises:
      UserError: if there is nothing there that can be packed.
    """
    path = epath.Path(pattern)
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.suffix in (".tar", ".parquet"))
        if inside:
            raise UserError(f"{path} holds {inside[0].suffix} files: write --input='{path}/*{inside[0].suffix}'.")
        return FolderInput(pattern)
    paths = sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
    if not paths:
        raise UserError(f"--input={pattern} matches nothing: give a folder, or a pattern such as '/data/*.tar'.")
    if all(p.name.endswith((".tar", ".tar.gz", ".tgz")) for p in paths):
        return TarInput(paths)
    if all(p.suffix == ".parquet" for p in paths):
        return ParquetInput(paths)
    raise UserError(f"--input={pattern} matches {paths[0].name}: only .tar or .parquet files can be packed together.")
