"""From a call's arguments to a request: options that all calls share, pictures of any kind, and which mode is meant."""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypedDict, TypeVar

import numpy as np
from PIL import Image

from imagegpt_jax import images as images_lib
from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.generation.postprocess import Postprocessing
from imagegpt_jax.generation.request import GenerationRequest, ImageInput, Label
from imagegpt_jax.sampling.settings import Sampling, renamed

P = ParamSpec("P")
R = TypeVar("R")
Words = str | Sequence[str] | None
Classes = int | str | Sequence[Label] | None
Picture = np.ndarray | Image.Image | str | Path
Pictures = Picture | Sequence[Picture]


class SamplingOptions(TypedDict, total=False):
    """The settings of `Sampling`, None for those of the decoder's config; and how it is run, see `Pipeline.prepare`."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    no_repeat_ngram_size: int | None
    cfg_scale: float | None
    cfg_schedule: str | None
    cfg_power: float | None
    cfg_start: float | None
    cfg_end: float | None
    weights: str | None
    speculative: int | None
    tokens_per_step: int | None
    batch_size: int | None
    mesh: Any
    on_step: Callable[[int, np.ndarray], None] | None


class Options(SamplingOptions, total=False):
    """What every call that makes images takes besides, see `GenerationRequest`."""

    classes: Classes
    negative: Words
    num_images: int
    seed: int
    best_of: int | None
    scorer: str | Callable[..., Any]
    postprocess: Postprocessing


RUN = ("batch_size", "mesh", "on_step")
DEFAULTS: dict[str, Any] = {"num_images": 1, "seed": 0, "scorer": "likelihood", "postprocess": Postprocessing()}
_SETTINGS = Sampling.__dataclass_fields__


SHARED = """
Shared arguments:
  gpt: the decoder, from `load_decoder`.
  tok: the image tokenizer that it was trained with, from `load_tokenizer` or `gpt.load_tokenizer()`.
  images: uint8 [B, H, W, C], or one or many of Pillow's pictures or paths.
  prompts: what to show, one for all or one for each; nothing by default.
  **options: see `GenerationRequest` and, for how codes are sampled, `Sampling`.

Raises:
  UserError: for arguments that are out of range, or do not fit each other or the decoder.
"""


def with_options(function: Callable[P, R]) -> Callable[P, R]:
    """Shows the options of `**options: Unpack[...]` in a function's signature.

    Raises UserError when it is called with an argument that it does not have, with the nearest one.
    """
    own = inspect.signature(function)
    (options,) = typing.get_args(typing.get_type_hints(function)["options"])
    shown = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS.get(name), annotation=hint)
        for name, hint in typing.get_type_hints(options).items()
        if name not in own.parameters
    ]
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    signature = own.replace(parameters=[*kept, *shown])

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = renamed(kwargs)
        for name in given.keys() - signature.parameters.keys():
            names = [name for name in signature.parameters if name != "self"]
            call_name = function.__name__.replace("__call__", "pipeline")
            raise UserError(f"{call_name}() has no argument {name!r}.{suggest(name, names)}")
        return function(*args, **given)  # type: ignore[arg-type]

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = f"{inspect.getdoc(function)}\n{SHARED}"
    return call


def request(
    mode: str, size: tuple[int, int], options: Mapping[str, Any], **fields: Any
) -> tuple[GenerationRequest, dict[str, Any]]:
    """The request of a call, and how it is to be run.

    Args:
      mode: of the request.
      size: (height, width) that pictures other than arrays are cropped and resized to.
      options: `Options` or `SamplingOptions`.
      **fields: of the request; None for those that are not given.

    Raises:
      UserError: for pictures that are none.
    """
    given = {name: value for name, value in {**options, **fields}.items() if value is not None}
    how = {name: given.pop(name) for name in RUN if name in given}
    settings = {name: given.pop(name) for name in list(given) if name in _SETTINGS}
    for name in ("prompts", "negative", "classes"):
        if name in given:
            given[name] = (given[name],) if isinstance(given[name], str | int) else tuple(given[name])
    if "images" in given:
        given["images"] = inputs(given["images"], size)
        pixels = given["images"][0].pixels if given["images"] else None
        size = size if pixels is None else (pixels.shape[0], pixels.shape[1])
    if "mask" in given:
        given["mask"] = inputs(given["mask"], size, mask=True)
    return GenerationRequest(mode=mode, settings=settings, **given), how


def inputs(pictures: Any, size: tuple[int, int], *, mask: bool = False) -> tuple[ImageInput, ...]:
    """One picture or many: arrays of uint8 [H, W, C], for masks bool [H, W], as they are; Pillow's in (height, width).

    Raises UserError for what is no picture.
    """
    single = isinstance(pictures, Image.Image | str | Path) or np.ndim(pictures) == (2 if mask else 3)
    several: Any = [pictures] if single else pictures
    return tuple(_input(picture, size, mask) for picture in several)


def _input(picture: Any, size: tuple[int, int], mask: bool) -> ImageInput:
    if isinstance(picture, str | Path):
        return ImageInput(str(picture)).hashed()
    if isinstance(picture, Image.Image):
        return ImageInput.of((images_lib.read_mask if mask else images_lib.read_picture)(picture, size))
    pixels = np.asarray(picture)
    if mask:
        return ImageInput.of(pixels.astype(bool))
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise UserError(
            f"pictures are uint8 [H, W, C], Pillow's or files, and this one is {pixels.dtype} {pixels.shape}: give"
            " values from 0 to 255 as uint8."
        )
    return ImageInput.of(pixels)


def is_pictures(value: Any) -> bool:
    """Whether an argument is pictures rather than prompts."""
    if isinstance(value, Image.Image | np.ndarray):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(map(is_pictures, value))


# Which given field tells the mode, the first that is there.
_OF_FIELD = {
    "mask": "inpaint",
    "margins": "outpaint",
    "region": "edit",
    "keep": "complete",
    "style": "style_transfer",
    "second_prompt": "interpolate",
}


def mode_of(fields: Mapping[str, Any]) -> str:
    """The mode that is meant by the fields of a call that are not None."""
    given = [name for name, value in fields.items() if value is not None]
    for name, mode in _OF_FIELD.items():
        if name in given:
            return mode
    if "images" in given:
        return "edit" if "prompts" in given else "variations"
    return "text_to_image" if "prompts" in given else "class_conditional" if "classes" in given else "unconditional"
