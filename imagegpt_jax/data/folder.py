"""A folder of image files as a source, with its captions or labels in any of three conventions.

    metadata   `metadata.jsonl` or `metadata.csv` in the folder or below it, with the columns `file_name` (relative to
               the metadata file) and `text` or `caption`, and maybe `label`: the Hugging Face image-folder
               convention. Images that it does not list are left out.
    sidecars   `cat.txt` beside `cat.jpg`; every line that is not empty is one caption.
    classes    every image is inside a sub-folder, and the first folder's name is the class.

The first that fits is taken; it is in `FolderSource.convention` and in `describe()`.
"""

import collections
import hashlib
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from imagegpt_jax.data import tables
from imagegpt_jax.data.images import EXTENSIONS
from imagegpt_jax.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")
# Larger files are not read: no picture or caption is so large.
MAX_BYTES = 1 << 28
CAPTION_COLUMNS = ("text", "caption", "captions")


class FolderSource:
    """Random access over the images of a folder, in the order of their paths.

    Attributes:
      name: "folder:PATH".
      convention: "metadata", "sidecars", "classes" or "images" (nothing but images).
      label_names: classes, sorted; empty unless there are labels.
      fingerprint: hash of paths, sizes, captions and labels (of the sidecars: their sizes).
      names: paths of the images below the folder.
      uncaptioned: images that have no caption, if the convention gives captions.
      left_out: how many images no metadata file lists.
      unread: extension -> how many files are of no format that is read here.
    """

    def __init__(self, path: epath.PathLike):
        """Lists the folder (hidden files and folders are skipped); reads metadata, but no image.

        Raises:
          UserError: if the folder is missing or holds no image, or a line of its metadata is wrong.
        """
        self.root = epath.Path(path).expanduser()
        self.name = f"folder:{self.root}"
        if not self.root.exists():
            raise UserError(f"there is no folder {self.root}: give folder:PATH of a folder with images.")
        if not self.root.is_dir():
            raise UserError(f"{self.root} is a file: give folder:PATH of the folder that holds the images.")
        sizes = dict(_walk(self.root))
        self._files = sorted(f for f in sizes if f.lower().endswith(EXTENSIONS))
        if not self._files:
            contents = f"{len(sizes)} files, the first is {min(sizes)}" if sizes else "nothing"
            raise UserError(
                f"{self.root} holds no image ({contents}): put images there ({', '.join(EXTENSIONS)}), or give another"
                " path."
            )
        self._captions: dict[str, list[str]] = {}
        self._sidecars: dict[str, str] = {}
        labels: dict[str, str] = {}
        total = len(self._files)
        metadata = sorted(f for f in sizes if f.rsplit("/", 1)[-1] in METADATA)
        sidecars = {f: text for f in self._files if (text := f.rsplit(".", 1)[0] + ".txt") in sizes}
        if metadata:
            self.convention = "metadata"
            self._captions, labels = self._read_metadata(metadata, set(self._files))
            self._files = [f for f in self._files if f in self._captions]
            self.uncaptioned = [f for f in self._files if not any(self._captions[f])]
        elif sidecars:
            self.convention = "sidecars"
            self._sidecars = sidecars
            self.uncaptioned = [f for f in self._files if not sizes.get(sidecars.get(f, ""))]
        elif all("/" in f for f in self._files):
            self.convention = "classes"
            labels = {f: f.split("/", 1)[0] for f in self._files}
            self.uncaptioned = self._files
        else:
            self.convention = "images"
            self.uncaptioned = self._files
        self.left_out = total - len(self._files)
        known = {*metadata, *sidecars.values(), *self._files}
        self.unread = collections.Counter(
            "." + f.rsplit("/", 1)[-1].rpartition(".")[2].lower()
            for f in sizes
            if f not in known and not f.lower().endswith((*EXTENSIONS, ".txt"))
        )
        self.unlabelled = [f for f in self._files if f not in labels]
        numeric = all(name.isdigit() for name in labels.values())
        self.label_names = tuple(sorted(set(labels.values()), key=int if numeric else None))
        number = {name: i for i, name in enumerate(self.label_names)}
        self._labels = {f: number[name] for f, name in labels.items()}
        self._sizes = sizes
        facts = [
            [f, sizes[f], self._captions.get(f), sizes.get(sidecars.get(f, "")), labels.get(f)] for f in self._files
        ]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode("utf-8", "replace")).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._files)

    @property
    def names(self) -> list[str]:
        """See above."""
        return self._files

    def describe(self) -> str:
        """One line for a log: how many images, which convention, and what is missing or left out."""
        what = {
            "metadata": "captions from metadata files",
            "sidecars": "captions from .txt files",
            "classes": f"{len(self.label_names)} classes from sub-folders",
            "images": "neither captions nor classes",
        }[self.convention]
        out = f"{self.name}: {len(self)} images, {what}"
        if self.convention in ("metadata", "sidecars") and self.uncaptioned:
            out += f", {len(self.uncaptioned)} without a caption"
        out += f", {self.left_out} left out because no metadata file lists them" if self.left_out else ""
        if not self.unread:
            return out
        return f"{out}, other files: {', '.join(f'{count} {kind}' for kind, count in self.unread.most_common(4))}"

    def require(self, what: str) -> None:
        """Checks that every image has "captions" or a "label".

        Raises:
          UserError: if not, saying what to add.
        """
        if what == "captions" and self.uncaptioned:
            fix = {
                "metadata": "fill the text column of its metadata file",
                "sidecars": f"write {self.uncaptioned[0].rsplit('.', 1)[0]}.txt and so on",
            }.get(self.convention, f"add a .txt file beside each image, or a {METADATA[0]} with file_name and text")
            raise UserError(
                f"{len(self.uncaptioned)} of {len(self)} images in {self.root} have no caption, the first is"
                f" {self.uncaptioned[0]}: {fix}."
            )
        if what == "label" and self.unlabelled:
            raise UserError(
                f"{len(self.unlabelled)} of {len(self)} images in {self.root} have no label, the first is"
                f" {self.unlabelled[0]}: put the images of each class into a sub-folder named after it"
                f" (found: {self.describe().split(', ', 1)[1]})."
            )

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads the files of some images.

        Raises:
          UserError: if a file that was there when the folder was listed cannot be read, or is larger than 256 MiB.
        """
        return [self._read(self._files[int(i)]) for i in indices]

    def _read(self, file: str) -> dict[str, Any]:
        for part in (file, self._sidecars.get(file, file)):
            if self._sizes[part] > MAX_BYTES:
                raise UserError(f"{self.root / part} has {self._sizes[part]} bytes: at most {MAX_BYTES}.")
        try:
            record: dict[str, Any] = {"id": file, "image": (self.root / file).read_bytes()}
            if self.convention == "metadata":
                record["captions"] = self._captions[file]
            elif self.convention == "sidecars":
                lines = ""
                if file in self._sidecars:
                    lines = (self.root / self._sidecars[file]).read_bytes().decode("utf-8-sig", "replace")
                record["captions"] = [line.strip() for line in lines.splitlines() if line.strip()]
        except OSError as e:
            raise UserError(
                f"{self.root / file} could not be read ({e.strerror or e}): put it back, or restart."
            ) from e
        if self.label_names:
            record["label"] = self._labels.get(file, -1)
        return record

    def _read_metadata(self, paths: list[str], files: set[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
        captions: dict[str, list[str]] = {}
        labels: dict[str, str] = {}
        for path in paths:
            below = path.rsplit("/", 1)[0] + "/" if "/" in path else ""
            file = self.root / path
            text = file.read_bytes().decode("utf-8-sig", "replace")
            for line, row in tables.rows(text, file, file.suffix):
                where = f"{file}, line {line}"
                if not isinstance(row.get("file_name"), str):
                    raise UserError(f"{where} has no file_name: each row names its image in file_name.")
                image = posixpath.normpath(below + row["file_name"].replace("\\", "/")).lstrip("/")
                if image not in files:
                    raise UserError(
                        f"{where} names {row['file_name']!r}, which is no image below {self.root / below}: correct"
                        " file_name (it is relative to the metadata file) or remove the line."
                    )
                column = next((c for c in CAPTION_COLUMNS if c in row), None)
                if column is None and "label" not in row:
                    raise UserError(
                        f"{where} has the columns {', '.join(map(str, row))}: call the caption's column text."
                    )
                value = row[column] if column else None
                captions[image] = [str(v) for v in (value if isinstance(value, list) else [value]) if v is not None]
                if row.get("label") not in (None, ""):
                    labels[image] = str(row["label"])
        return captions, labels


def _walk(root: epath.Path, below: str = "") -> Iterator[tuple[str, int]]:
    """Yields (path below root with forward slashes, size in bytes) of every file that is not hidden."""
    for entry in root.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, f"{below}{entry.name}/")
        else:
            yield below + entry.name, entry.stat().length
