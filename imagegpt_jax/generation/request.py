"""What is to be generated, as plain data: the same under the binary, a notebook, the metadata of a PNG and a server.

Shapes: B images, H W C image.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagegpt_jax import images as images_lib
from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.generation.postprocess import Postprocessing

VERSION = 1
Label = int | str | None


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """A picture or a mask: a file, which is cropped and resized to the decoder's size, or pixels, taken as they are.

    Attributes:
      path: of the file; "" for pixels.
      sha256: the first 16 hexadecimal digits of its hash, which a file must still have; "" where any will do.
      pixels: uint8 [H, W, C], or bool [H, W] of a mask.
    """

    path: str = ""
    sha256: str = ""
    pixels: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, pixels: np.ndarray) -> "ImageInput":
        """Pixels as an input."""
        return cls(sha256=_digest(np.ascontiguousarray(pixels).tobytes()), pixels=pixels)

    def hashed(self) -> "ImageInput":
        """The same input with the hash of its file.

        Raises:
          UserError: if the file cannot be read, or is another one than the hash says.
        """
        if not self.path:
            return self
        try:
            digest = _digest(Path(self.path).read_bytes())
        except OSError as e:
            raise UserError(f"{self.path} cannot be read ({e.strerror}): give a picture.") from None
        if self.sha256 not in ("", digest):
            raise UserError(f"{self.path} is not the file of the request: its contents have changed.")
        return dataclasses.replace(self, sha256=digest)

    def load(self, size: tuple[int, int], *, mask: bool = False) -> np.ndarray:
        """The picture as uint8 [H, W, C], or the mask as bool [H, W]; a file's in this (height, width).

        Raises:
          UserError: for a file that is no picture.
        """
        if self.pixels is not None:
            return self.pixels
        try:
            return (images_lib.read_mask if mask else images_lib.read_picture)(self.path, size)
        except OSError as e:
            raise UserError(f"{self.path} is not a picture that can be read ({e}).") from None

    def to_json(self) -> dict[str, str]:
        """A path with its hash, or pixels as a PNG in base64."""
        if self.pixels is None:
            return {"path": self.path, "sha256": self.sha256}
        pixels = self.pixels if self.pixels.dtype == np.uint8 else np.uint8(255) * self.pixels[..., None]
        return {"png": base64.b64encode(images_lib.png_bytes(pixels, {})).decode()}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is to be generated. `modes.MODES` says which fields a mode needs; all have defaults.

    Attributes:
      mode: a key of `modes.MODES`.
      prompts: texts, "" for none; with images one for all of them or one for each.
      classes: names or numbers, None for none; beside prompts one for each.
      negative: negative prompts, one for all or one for each.
      images: pictures to change or to describe.
      mask: light, or set, where new pixels go: one for all images or one for each.
      margins: pixels to add at the top, right, bottom and left.
      region: (top, left, height, width) in pixels that is generated anew.
      keep: how much of the height stays, 0 to 1.
      strength: share of the codes that are generated anew, 0 to 1; None for the mode's own.
      style: name of the wanted style.
      source_style: name of the style that the captions have.
      second_prompt: where an interpolation ends.
      shares: how much of the second prompt is in each image of an interpolation.
      grid: (rows, columns) of codes; None for the decoder's own.
      settings: fields of `Sampling` in place of the decoder's own.
      seed: image i depends only on (seed, i).
      num_images: images, or captions, of each prompt, class or picture.
      sample_indices: the number i of each image; () for 0, 1, ...
      best_of: sample so many of each and keep the best `num_images`; None for all.
      scorer: which are the best, see `scorers`.
      beams: beam search for captions with so many beams; 0 = sample them.
      postprocess: what is done to the images at the end.
    """

    mode: str = "text_to_image"
    prompts: tuple[str, ...] = ()
    classes: tuple[Label, ...] = ()
    negative: tuple[str, ...] = ()
    images: tuple[ImageInput, ...] = ()
    mask: tuple[ImageInput, ...] = ()
    margins: tuple[int, int, int, int] | None = None
    region: tuple[int, int, int, int] | None = None
    keep: float = 0.5
    strength: float | None = None
    style: str = ""
    source_style: str = ""
    second_prompt: str = ""
    shares: tuple[float, ...] = ()
    grid: tuple[int, int] | None = None
    settings: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    num_images: int = 1
    sample_indices: tuple[int, ...] = ()
    best_of: int | None = None
    scorer: str | Callable[..., Any] = "likelihood"
    beams: int = 0
    postprocess: Postprocessing = dataclasses.field(default_factory=Postprocessing)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and text: the version, the mode, and every field that is not its default.

        Raises:
          UserError: for a scorer that has no name.
        """
        if callable(self.scorer):
            raise UserError("a scorer that is a function has no JSON form: name it as module:function.")
        return {"version": VERSION, "mode": self.mode} | _plain(self)

    @classmethod
    def from_json(cls, body: Any) -> "GenerationRequest":
        """The request of `to_json`, strictly.

        Raises:
          UserError: for another version, an unknown field or a value of another type.
        """
        if not isinstance(body, Mapping) or body.get("version") != VERSION:
            raise UserError(f"this is no request of version {VERSION}: it is an object with 'version': {VERSION}.")
        return _of_json(cls, {name: value for name, value in body.items() if name != "version"}, "request")

    def hashed(self) -> "GenerationRequest":
        """The same request with the hashes of its files; errors as `ImageInput.hashed`."""
        images, mask = (tuple(image.hashed() for image in inputs) for inputs in (self.images, self.mask))
        return dataclasses.replace(self, images=images, mask=mask)

    @functools.cached_property
    def entries(self) -> tuple[list[str], list[Label]]:
        """The prompt and the class of each of B entries; every entry gives `num_images` images.

        Raises:
          UserError: for numbers of prompts, classes and images that do not fit each other.
        """
        texts: list[Any] = list(self.prompts)
        labels: list[Any] = list(self.classes)
        count = len(self.images) or len(self.shares)
        if any(not isinstance(text, str) for text in texts):
            raise UserError("prompts are text.")
        if self.mode == "unconditional":
            return [""], [None]
        if count:
            texts, labels = (values * count if len(values) == 1 else values for values in (texts, labels))
            if not texts and not labels:
                texts = [""] * count
            if {len(texts), len(labels)} - {0, count}:
                raise UserError(f"there are {len(texts)} prompts and {len(labels)} classes for {count} pictures.")
        if texts and labels and len(texts) != len(labels):
            raise UserError(
                f"there are {len(texts)} prompts and {len(labels)} classes: give one class for each prompt."
            )
        return texts or [""] * len(labels), labels or [None] * len(texts)

    def indices(self) -> list[int]:
        """The number i of each image, on which with the seed all its random numbers depend."""
        total = len(self.entries[0]) * self.num_images
        if self.sample_indices and len(self.sample_indices) != total:
            raise UserError(f"there are {len(self.sample_indices)} sample_indices for {total} images.")
        # All images of an interpolation have the same random numbers, so that the prompt alone changes.
        same = bool(self.shares) and self.best_of is None
        return list(self.sample_indices) or [i % self.num_images if same else i for i in range(total)]

    def single(self, entry: int, index: int) -> "GenerationRequest":
        """The request of one image alone: of an entry, with the number `index` of its random numbers."""
        texts, labels = self.entries

        def own(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values) if len(values) < 2 else (values[entry],)

        text, label = texts[entry], labels[entry]
        return dataclasses.replace(
            self,
            mode=self.mode if self.images or self.shares else mode_of_entry([text], [label]),
            prompts=(text,) if text else (),
            classes=() if label is None else (label,),
            negative=own(self.negative),
            images=own(self.images),
            mask=own(self.mask),
            shares=own(self.shares),
            num_images=1,
            sample_indices=(index,),
            best_of=None,
            scorer="likelihood",
        )


def mode_of_entry(prompts: Sequence[str], classes: Sequence[Label]) -> str:
    """The mode of a request that changes no images."""
    if any(prompts):
        return "text_to_image"
    return "class_conditional" if any(label is not None for label in classes) else "unconditional"


# --------------------------------------------------------------------------------------------------------------- JSON


def _plain(value: Any) -> Any:
    if isinstance(value, ImageInput):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        default = type(value)()
        names = [field.name for field in dataclasses.fields(value)]
        fields = {name: getattr(value, name) for name in names if getattr(value, name) != getattr(default, name)}
        return {name: _plain(field) for name, field in fields.items()}
    if isinstance(value, Mapping):
        return dict(value)
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _of_json(cls: Any, body: Any, where: str) -> Any:
    """Builds a dataclass of which every field has a default."""
    if not isinstance(body, Mapping):
        raise UserError(f"{where} must be an object, and it is {body!r}.")
    hints = typing.get_type_hints(cls)
    for name in body:
        if name not in hints:
            raise UserError(f"{where} has no field {name!r}.{suggest(str(name), hints)}")
    return cls(**{name: _typed(hints[name], value, name) for name, value in body.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is ImageInput:
        return _input(value, where)
    if dataclasses.is_dataclass(hint):
        return _of_json(hint, value, where)
    if kind is tuple and isinstance(value, list):
        if parts[-1] is Ellipsis:
            return tuple(_typed(parts[0], part, where) for part in value)
        if len(value) == len(parts):
            return tuple(_typed(part, v, where) for part, v in zip(parts, value, strict=True))
    elif kind is types.UnionType:
        for part in parts:
            try:
                return _typed(part, value, where)
            except UserError:
                continue
    elif kind is Mapping and isinstance(value, Mapping):
        return {str(name): _typed(parts[1], part, f"{where}.{name}") for name, part in value.items()}
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise UserError(f"{where}={value!r} must be {getattr(hint, '__name__', None) if not parts else hint}.")


def _input(value: Any, where: str) -> ImageInput:
    known = ("path", "sha256", "png")
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for text in value.values()):
        raise UserError(f"{where} must be {{'path': FILE}} or {{'png': BASE64}}, and it is {value!r}.")
    for name in value:
        if name not in known:
            raise UserError(f"{where} has no field {name!r}.{suggest(name, known)}")
    if "png" not in value:
        return ImageInput(value.get("path", ""), value.get("sha256", ""))
    try:
        with Image.open(io.BytesIO(base64.b64decode(value["png"], validate=True))) as png:
            pixels = np.asarray(png if png.mode in ("L", "RGB") else png.convert("RGB"))
    except (OSError, ValueError) as e:
        raise UserError(f"{where} is no PNG in base64 ({e}).") from None
    if where == "mask":
        return ImageInput.of(pixels.reshape(*pixels.shape[:2], -1)[..., 0] >= 128)
    return ImageInput.of(pixels.reshape(*pixels.shape[:2], -1))
