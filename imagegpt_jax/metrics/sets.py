"""Sets of images and of statistics that scores are computed from: folders, and `.npz` files as ADM publishes them.

Nothing here starts JAX: what is wrong with a set is told within seconds. Images are in the order of their paths, or of
the array, and are read by number, so that many processes can share the work.
Shapes: N images, H W pixels, D features.
"""

import dataclasses
import functools
import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from imagegpt_jax.data.images import EXTENSIONS
from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics.resizing import Crop

# Keys of .npz files, those of ADM's and of common programs first.
_IMAGES = ("arr_0", "images", "samples")
_FEATURES = ("pool_3", "features", "activations", "acts")
_MEAN, _COVARIANCE = ("mu", "sigma"), ("mu_s", "sigma_s")
_LOSSY = ("JPEG", "WEBP")
_DEPTH = 24  # where a PNG says how many bits its channels have
_DEEP = "has 16 or more bits per channel"
_GREY = "is greyscale"
_PHOTOGRAPHS = (_GREY, "is in the colour mode CMYK")  # which the programs that crop photographs make RGB of
_OVERVIEWS = ("grid.png", "samples.gif")  # which `sample` puts beside its samples
Size = tuple[int, int]


class ImageSet(Protocol):
    """Images by number.

    Attributes:
      path: where they are.
      size: (height, width) of every image.
      formats: how many files are of each format, such as {"PNG": 100}.
      in_order: whether reading in another order than that of the numbers, or in many threads, is slow or wrong.
    """

    path: str
    size: Size
    formats: dict[str, int]
    in_order: bool

    @property
    def names(self) -> Sequence[str]:
        """What each image is called."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what `read` returns."""
        ...

    def __len__(self) -> int: ...

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """One image."""
        ...


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Means and covariances, or features, in place of reference images.

    Attributes:
      path: the file.
      arrays: "pool" and perhaps "spatial" -> (mean [D], covariance [D, D]); float64.
      features: float32 [N, D] of "pool", or None.
      count: images that they are of; None if the file does not say.
      about: what our own files say of themselves: protocol, hashes, version.
      sha256: of the file.
      images: reference images that lie beside the statistics, as in ADM's files; None if there are none.
    """

    path: str
    arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]
    features: np.ndarray | None
    count: int | None
    about: Mapping[str, Any]
    sha256: str
    images: ImageSet | None = None


# ------------------------------------------------------------------------------------------------------------- folders


def _header(path: epath.Path) -> tuple[str, str, Size]:
    """(format, what is wrong with its pixels or "", (height, width)) by the first bytes of a file."""
    try:
        with path.open("rb") as file:
            start = file.read(_DEPTH + 1)
            file.seek(0)
            with Image.open(file) as image:
                # Pillow says "RGB" of 16-bit colour in PNGs, and would cut it to 8 bits.
                deep = image.format == "PNG" and start[_DEPTH] > 8
                return image.format or "", _DEEP if deep else _unfit(image), (image.height, image.width)
    except UnidentifiedImageError as e:
        raise UserError(f"{path} is not an image, or is damaged at its beginning: remove or replace it.") from e
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise UserError(f"{path} cannot be read ({' '.join(str(e).split())}): remove or replace it.") from e


def _unfit(image: Image.Image) -> str:
    if image.mode.startswith("I") or image.mode == "F":
        return _DEEP
    if image.has_transparency_data or image.mode in ("RGBA", "LA", "PA"):
        return "has an alpha channel"
    if image.mode in ("L", "1"):
        return _GREY
    return "" if image.mode in ("RGB", "P") else f"is in the colour mode {image.mode}"


class Folder:
    """The images of a folder and its sub-folders, but for the overviews that `sample` puts there."""

    in_order = False

    def __init__(self, path: epath.PathLike, limit: int = 0, crop: Crop | None = None):
        """Lists the files and checks what their headers say.

        Args:
          path: the folder.
          limit: only so many images, the first ones; 0 is all.
          crop: how photographs come to one size, in grey or print colours too; None where they must be alike.

        Raises:
          UserError: if there are none, one is not 8-bit RGB, or they differ in size.
        """
        self.path = str(path)
        files = sorted(_listed(epath.Path(path)), key=str)
        if not files:
            raise UserError(f"there are no images in {path}: it should hold files that end in {', '.join(EXTENSIONS)}.")
        self._files = files[:limit] if limit else files
        self.formats: dict[str, int] = {}
        sizes: dict[Size, epath.Path] = {}
        for file in self._files:
            kind, unfit, size = _header(file)
            if unfit and not (crop is not None and unfit in _PHOTOGRAPHS):
                raise UserError(
                    f"{file} {unfit}, and scores are of 8-bit RGB: save the images as RGB, which shows what is scored."
                )
            self.formats[kind] = self.formats.get(kind, 0) + 1
            sizes.setdefault(size, file)
            if len(sizes) > 1 and crop is None:
                (a, first), (b, second) = sizes.items()
                raise UserError(
                    f"the images of {path} differ in size, {first.name} is {a[0]} x {a[1]} and {second.name} is"
                    f" {b[0]} x {b[1]} (height x width): bring them to one size first."
                )
        self._crop = crop if crop is not None and crop.changes(sizes) else None
        self.size: Size = next(iter(sizes)) if self._crop is None else (self._crop.side, self._crop.side)

    @property
    def names(self) -> Sequence[str]:
        """Paths within the folder."""
        return [os.path.relpath(file, self.path) for file in self._files]

    @property
    def shape(self) -> tuple[int, ...]:
        """[H, W, 3]."""
        return (*self.size, 3)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """Decodes one image.

        Raises:
          UserError: if it is damaged.
        """
        file = self._files[number]
        try:
            with file.open("rb") as stream, Image.open(stream) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, EOFError) as e:
            raise UserError(
                f"{file} is damaged ({' '.join(str(e).split())}): remove or replace it, and score again."
            ) from e
        return pixels if self._crop is None else self._crop(pixels)


def _listed(folder: epath.Path) -> list[epath.Path]:
    found = []
    for file in folder.iterdir():
        if file.is_dir():
            found += _listed(file)
        elif file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.name not in _OVERVIEWS:
            found.append(file)
    return found


# --------------------------------------------------------------------------------------------------------------- arrays


class Array:
    """The images of an array [N, H, W, 3] in a `.npz`, read from the file one after another."""

    in_order = True

    def __init__(self, path: epath.PathLike, key: str, limit: int = 0, crop: Crop | None = None):
        """Checks the array's header; `limit` keeps only the first images, 0 all; `crop` as in `Folder`.

        Raises:
          UserError: if it does not hold 8-bit RGB images.
        """
        self.path, self._key = str(path), key
        stream, shape, dtype = _open_member(self.path, key)
        stream.close()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
            kind = "greyscale" if len(shape) == 3 or shape[-1:] == (1,) else ""
            kind = "with an alpha channel" if shape[3:] == (4,) else "no image" if 0 in shape else kind
            raise UserError(
                f"the array {key!r} of {path} is {dtype} {list(shape)}{f', {kind}' if kind else ''}: images are uint8"
                " [N, height, width, 3]."
            )
        self._count = min(limit, shape[0]) if limit else shape[0]
        self._crop = crop if crop is not None and crop.changes([shape[1:3]]) else None
        self._stored = shape[1:]
        self.size: Size = (shape[1], shape[2]) if self._crop is None else (self._crop.side, self._crop.side)
        self.formats = {"NPZ": self._count}
        self._bytes = int(np.prod(self._stored))
        self._stream, self._next = None, 0

    @property
    def names(self) -> Sequence[str]:
        """Numbers."""
        return [str(i) for i in range(self._count)]

    @property
    def shape(self) -> tuple[int, ...]:
        """[H, W, 3]."""
        return (*self.size, 3)

    def __len__(self) -> int:
        return self._count

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """One image; going back starts at the array's beginning again.

        Raises:
          UserError: if the file is damaged.
        """
        try:
            if self._stream is None or number < self._next:
                self._stream, self._next = _open_member(self.path, self._key)[0], 0
            while self._next <= number:
                data = self._stream.read(self._bytes)
                self._next += 1
        except (OSError, EOFError, zipfile.BadZipFile, ValueError) as e:
            raise UserError(f"{self.path} is damaged ({e}): copy it again.") from e
        if len(data) != self._bytes:
            raise UserError(f"{self.path} is damaged (it ends within image {number}): copy it again.")
        pixels = np.frombuffer(data, np.uint8).reshape(self._stored)
        return pixels if self._crop is None else self._crop(pixels)


def _members(path: str) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (OSError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is not a whole .npz file ({e}): copy it again.") from e


def _open_member(path: str, key: str) -> tuple[Any, tuple[int, ...], np.dtype]:
    """An open stream at the first element of an array, its shape and its dtype."""
    try:
        stream = zipfile.ZipFile(path).open(f"{key}.npy")  # noqa: SIM115 - the caller reads on
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is damaged ({e}): copy it again.") from e
    if fortran and len(shape) > 1:
        raise UserError(f"the array {key!r} of {path} is stored in Fortran's order: save it with np.ascontiguousarray.")
    return stream, shape, dtype


# ------------------------------------------------------------------------------------------------------------- opening


def open_images(path: epath.PathLike, limit: int = 0, crop: Crop | None = None) -> ImageSet:
    """Opens a folder or a `.npz` of images.

    Args:
      path: which.
      limit: only so many images, the first ones; 0 is all.
      crop: how images come to one size; None where they must be alike.

    Raises:
      UserError: if there is no such thing, or its images cannot be scored.
    """
    place = epath.Path(path)
    if place.is_dir():
        return Folder(place, limit, crop)
    if not place.exists():
        raise UserError(f"there is no folder or file {path}: give a folder of images or a .npz file.")
    if place.suffix != ".npz":
        raise UserError(f"{path} is neither a folder of images nor a .npz file.")
    keys = _members(str(path))
    key = next((key for key in _IMAGES if key in keys), None)
    if key is None:
        raise UserError(f"{path} holds {', '.join(keys) or 'nothing'}: images are under {' or '.join(_IMAGES)}.")
    return Array(place, key, limit, crop)


def open_reference(path: epath.PathLike, crop: Crop | None = None) -> ImageSet | Statistics:
    """Opens what images are compared with: images, features, or means and covariances.

    Of a `.npz` with "mu" and "sigma" those count for FID, and images that lie beside them, as in ADM's files, for
    what needs images.

    Raises:
      UserError: as `open_images`, and for statistics that are not of the right shapes.
    """
    place = epath.Path(path)
    if place.suffix != ".npz" or not place.exists():
        return open_images(path, crop=crop)
    keys = _members(str(path))
    features = next((key for key in _FEATURES if key in keys), None)
    if features is None and "arr_0" in keys and len(_open_member(str(path), "arr_0")[1]) == 2:
        features = "arr_0"
    if features is None and not set(_MEAN) <= set(keys):
        return open_images(path, crop=crop)
    return _read_statistics(place, keys, features)


def _read_statistics(path: epath.Path, keys: Sequence[str], features: str | None) -> Statistics:
    with np.load(str(path), allow_pickle=False) as file:
        arrays = {}
        for name, (mean, covariance) in (("pool", _MEAN), ("spatial", _COVARIANCE)):
            if mean in keys and covariance in keys:
                pair = (np.asarray(file[mean], np.float64), np.asarray(file[covariance], np.float64))
                if pair[0].ndim != 1 or pair[1].shape != (len(pair[0]),) * 2:
                    raise UserError(f"{path}: {mean} is {pair[0].shape} and {covariance} {pair[1].shape}: damaged.")
                arrays[name] = pair
        rows = np.asarray(file[features], np.float32) if features else None
        about = _about(file["about"]) if "about" in keys else {}
        count = int(file["n"]) if "n" in keys else len(rows) if rows is not None else None
    if rows is not None and "pool" not in arrays:
        centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
        arrays["pool"] = (
            rows.mean(axis=0, dtype=np.float64),
            centred.T @ centred / max(len(rows) - 1, 1),
        )
    images = Array(path, "arr_0") if "arr_0" in keys and features is None else None
    return Statistics(str(path), arrays, rows, count, about, hash_file(str(path)), images)


def _about(text: np.ndarray) -> Mapping[str, Any]:
    import json

    return json.loads(str(text))


@functools.cache
def hash_file(path: str) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def lossy(images: ImageSet) -> int:
    """How many files are of a format that loses detail."""
    return sum(images.formats.get(kind, 0) for kind in _LOSSY)
