"""Sets of images that scores are computed from: folders, `.npz` files as ADM publishes them, data sources, and arrays.

Nothing here imports JAX: what is wrong with a set is reported within seconds. Images are in the order of their paths,
or of the array, and are read by number, so that many processes can share the work.
Shapes: N images, B batch, H W pixels, C channels.
"""

import itertools
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from imagegpt_jax import images as images_lib
from imagegpt_jax.data import pipeline
from imagegpt_jax.data.images import EXTENSIONS
from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import statistics_files
from imagegpt_jax.metrics.resizing import Crop
from imagegpt_jax.metrics.statistics_files import FileStatistics

_IMAGES = ("arr_0", "images", "samples")  # keys of .npz files, those of ADM's and of common programs first
_DEPTH = 24  # where a PNG says how many bits its channels have
_DEEP = "has 16 or more bits per channel"
_GREY = "is greyscale"
_PHOTOGRAPHS = (_GREY, "is in the colour mode CMYK")  # which the programs that crop photographs make RGB of
_OVERVIEWS = ("grid.png", "samples.gif")  # which `sample` puts beside its samples
_BATCH_SIZE = 32  # of a data source
Size = tuple[int, int]


class ImageSet(Protocol):
    """Images by number.

    Attributes:
      path: where they are.
      size: (height, width) of every image.
      formats: how many files are of each format, such as {"PNG": 100}.
      in_order: whether reading in another order than that of the numbers, or in many threads, is slow or wrong.
      names: what each image is called.
      shape: of what `read` returns.
    """

    path: str
    size: Size
    formats: dict[str, int]
    in_order: bool
    names: list[str]
    shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """One image."""
        ...


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


class _Stream:
    """Images by number from an iterator; going back starts a new one at its beginning."""

    def __init__(self, begin: Callable[[], Iterator[np.ndarray]]):
        self._begin, self._images, self._next = begin, begin(), 0

    def read(self, number: int) -> np.ndarray:
        if number < self._next:
            self._images, self._next = self._begin(), 0
        image_HWC = next(itertools.islice(self._images, number - self._next, None))
        self._next = number + 1
        return image_HWC


class Folder:
    """The images of a folder and its sub-folders, but for the overviews that `sample` puts there."""

    in_order = False

    def __init__(self, path: epath.PathLike, limit: int = 0, crop: Crop | None = None):
        """Lists the files and checks what their headers say; arguments as of `open_images`.

        With a crop, photographs may be in grey or print colours too.

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
        self.shape = (*self.size, 3)
        self.names = [os.path.relpath(file, self.path) for file in self._files]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """Decodes one image; raises UserError if it is damaged."""
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
    files = []
    for file in folder.iterdir():
        if file.is_dir():
            files += _listed(file)
        elif file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.name not in _OVERVIEWS:
            files.append(file)
    return files


# --------------------------------------------------------------------------------------------------------------- arrays


class NpzImages:
    """The images of an array [N, H, W, 3] in a `.npz`, read from the file one after another."""

    in_order = True

    def __init__(self, path: epath.PathLike, key: str, limit: int = 0, crop: Crop | None = None):
        """Checks the array's header; arguments as of `open_images`; raises UserError unless it is 8-bit RGB."""
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
        self.size: Size = (shape[1], shape[2]) if self._crop is None else (self._crop.side, self._crop.side)
        self.shape = (*self.size, 3)
        self.formats = {"NPZ": self._count}
        self.names = [str(i) for i in range(self._count)]
        self._stream = _Stream(self._images)

    def _images(self) -> Iterator[np.ndarray]:
        stream, shape, _ = _open_member(self.path, self._key)
        size = int(np.prod(shape[1:]))
        for number in range(self._count):
            try:
                data = stream.read(size)
            except (OSError, EOFError, zipfile.BadZipFile, ValueError) as e:
                raise UserError(f"{self.path} is damaged ({e}): copy it again.") from e
            if len(data) != size:
                raise UserError(f"{self.path} is damaged (it ends within image {number}): copy it again.")
            yield np.frombuffer(data, np.uint8).reshape(shape[1:])

    def __len__(self) -> int:
        return self._count

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """One image; going back starts at the array's beginning again; raises UserError if the file is damaged."""
        pixels = self._stream.read(number)
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


# ------------------------------------------------------------------------------------------- images that are in no file


class InMemory:
    """Images in memory."""

    in_order = False

    def __init__(self, name: str, images_NHWC: UInt8[np.ndarray, "N H W 3"], names: Sequence[str] = ()):
        """Holds images, called `names`, or by their numbers."""
        self.path, self._images = name, images_NHWC
        self.shape, self.size = images_NHWC.shape[1:], (images_NHWC.shape[1], images_NHWC.shape[2])
        self.formats = {"decoded": len(images_NHWC)}
        self.names = list(names) or [str(i) for i in range(len(images_NHWC))]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """One image."""
        return self._images[number]


class SourceImages:
    """Images of a data source after its operations, in order; or what a function makes of them, such as a tokenizer."""

    in_order = True

    def __init__(self, name: str, source: Any, ops: str, function: Callable[[np.ndarray], np.ndarray] | None = None):
        """Reads the first image to learn the size, the same for all after `ops`.

        `function` makes of images, float32 [B, H, W, C] in [-1, 1], others of that kind, such as reconstructions.

        Raises:
          UserError: if the images are not RGB.
        """
        self.path, self._source, self._ops, self._function = name, source, ops, function
        first = next(self._images())
        if first.shape[-1] != 3:
            raise UserError(f"FID and the like are of RGB images, and those of {name} have {first.shape[-1]} channels.")
        self._stream = _Stream(self._images)
        self.shape, self.size = first.shape, (first.shape[0], first.shape[1])
        self.formats = {"decoded": len(source)}
        self.names = [str(i) for i in range(len(source))]

    def _images(self) -> Iterator[np.ndarray]:
        one_pass: Any = {"batch_size": _BATCH_SIZE, "shuffle": False, "epochs": 1, "columns": ("image",)}
        batches = pipeline.Batches(self._source, ops=self._ops, **one_pass)
        try:
            for batch in batches:
                images_BHWC = batch["image"][batch["mask"]] if "mask" in batch else batch["image"]
                made_BHWC = images_BHWC if self._function is None else self._function(images_BHWC)
                yield from images_lib.to_uint8(made_BHWC)
        finally:
            batches.close()

    def __len__(self) -> int:
        return len(self._source)

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """One image; going back starts at the beginning again."""
        return self._stream.read(number)


# ------------------------------------------------------------------------------------------------------------- opening


def open_images(path: epath.PathLike, limit: int = 0, crop: Crop | None = None) -> ImageSet:
    """Opens a folder or a `.npz` of images, all or the first `limit`; without a `crop` to one size, they must be alike.

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
    return NpzImages(place, key, limit, crop)


def open_reference(
    path: epath.PathLike, crop: Crop | None = None, network: str = "inception"
) -> ImageSet | FileStatistics:
    """Opens what images are compared with: images, features, or means and covariances.

    Of a `.npz` with "mu" and "sigma" those count for FID, and images that lie beside them, as in ADM's files, for
    what needs images. Features and statistics are of `network`; `crop` is as of `open_images`.

    Raises:
      UserError: as `open_images`, and for statistics that are not of the right shapes.
    """
    place = epath.Path(path)
    if place.suffix != ".npz" or not place.exists():
        return open_images(path, crop=crop)
    keys = _members(str(path))
    features = next((key for key in statistics_files.FEATURES if key in keys), None)
    if features is None and "arr_0" in keys and len(_open_member(str(path), "arr_0")[1]) == 2:
        features = "arr_0"
    if features is None and not set(statistics_files.KEYS["pool"]) <= set(keys):
        return open_images(path, crop=crop)
    images = NpzImages(path, "arr_0") if "arr_0" in keys and features is None else None
    return statistics_files.read_statistics(place, keys, features, network, images)
