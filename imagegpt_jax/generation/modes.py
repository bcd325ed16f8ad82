"""The modes of generation: what each needs, which fields are its own, and which codes and pixels of a picture it keeps.

Shapes: B images, H W C image, r c code grid, N = r * c codes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.generation.request import GenerationRequest
from imagegpt_jax.sampling.settings import UNKNOWN

if TYPE_CHECKING:
    from imagegpt_jax.inference.loading import Tokenizer

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Known:
    """What stays of pictures.

    Attributes:
      codes: int32 [B, N], UNKNOWN where they are generated.
      grid: rows and columns of the codes.
      source: uint8 [B, H, W, C], whose pixels stay where `fresh` is not set; None where no pixels stay.
      fresh: bool [B, H, W], where new pixels go.
    """

    codes: np.ndarray
    grid: Grid
    source: np.ndarray | None = None
    fresh: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way of asking.

    Attributes:
      needs: fields of the request that must be given, and what they are.
      takes: further fields that are this mode's own.
      known: what of the request's images stays; None for a mode that changes no images.
      strength: share of the codes that are generated anew, where the request does not say.
    """

    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    takes: tuple[str, ...] = ()
    known: Callable[[GenerationRequest, "Tokenizer", np.ndarray], Known] | None = None
    strength: float = 0.5


def check(request: GenerationRequest) -> Mode:
    """The mode of a request.

    Raises UserError if there is none, the request lacks what it needs, or has what it does not.
    """
    if request.mode not in MODES:
        raise UserError(f"unknown mode {request.mode!r}.{suggest(request.mode, MODES)}")
    mode = MODES[request.mode]
    for name, what in mode.needs.items():
        if not getattr(request, name):
            raise UserError(f"{request.mode} needs {name}: {what}.")
    default = GenerationRequest()
    for name in sorted(OWN - fields_of(request.mode)):
        if getattr(request, name) != getattr(default, name):
            raise UserError(f"{request.mode} does not use {name}: leave it out.")
    if request.num_images < 1 or request.seed < 0:
        raise UserError("generating needs num_images >= 1 and seed >= 0.")
    if request.shares and len(request.prompts) != 1:
        raise UserError("interpolate needs one prompt to begin with.")
    request.indices()  # numbers of prompts, classes and pictures that fit each other
    return mode


def fields_of(mode: str) -> set[str]:
    """The fields that are a mode's own."""
    return {*MODES[mode].needs, *MODES[mode].takes}


def source_codes(tok: "Tokenizer", images: np.ndarray) -> tuple[np.ndarray, Grid]:
    """(codes [B, N], grid) of uint8 [B, H, W, C]."""
    height, width = images.shape[1:3]
    if height % tok.downsample or width % tok.downsample:
        raise UserError(f"height and width {(height, width)} must be multiples of {tok.downsample}: resize or crop.")
    return tok.encode(images), (height // tok.downsample, width // tok.downsample)


# ----------------------------------------------------------------------------------------------- what of images stays


def _outside(tok: "Tokenizer", source: np.ndarray, masks: np.ndarray) -> Known:
    """Keeps pixels outside of bool [H, W] or [B, H, W], and the codes of which no pixel is inside."""
    codes, grid = source_codes(tok, source)
    if masks.shape[-2:] != source.shape[1:3] or masks.ndim not in (2, 3) or len(masks) == 0:
        raise UserError(f"a mask has the pictures' height and width {source.shape[1:3]}, and this one {masks.shape}.")
    masks = np.broadcast_to(masks, source.shape[:3])
    touched = masks.reshape(len(masks), grid[0], tok.downsample, grid[1], tok.downsample).any((2, 4))
    return Known(np.where(touched.reshape(codes.shape), UNKNOWN, codes), grid, source, masks)


def _inpaint(request: GenerationRequest, tok: "Tokenizer", source: np.ndarray) -> Known:
    masks = [mask.load(source.shape[1:3], mask=True) for mask in request.mask]
    if len(masks) not in (1, len(source)):
        raise UserError(f"there are {len(masks)} masks for {len(source)} pictures: give one, or one for each.")
    return _outside(tok, source, np.stack(masks))


def _outpaint(request: GenerationRequest, tok: "Tokenizer", source: np.ndarray) -> Known:
    margins = request.margins or ()
    if len(margins) != 4 or any(m < 0 or m % tok.downsample for m in margins):
        raise UserError(f"margins={tuple(margins)} must be four multiples of {tok.downsample}: top,right,bottom,left.")
    codes, grid = source_codes(tok, source)
    top, right, bottom, left = margins
    wide = np.pad(source, ((0, 0), (top, bottom), (left, right), (0, 0)))
    fresh = np.pad(np.zeros(source.shape[:3], bool), ((0, 0), (top, bottom), (left, right)), constant_values=True)
    cells = [(m // tok.downsample, n // tok.downsample) for m, n in ((top, bottom), (left, right))]
    known = np.pad(codes.reshape(-1, *grid), ((0, 0), *cells), constant_values=UNKNOWN)
    return Known(known.reshape(len(known), -1), known.shape[1:], wide, fresh)


def _complete(request: GenerationRequest, tok: "Tokenizer", source: np.ndarray) -> Known:
    if not 0 <= request.keep <= 1:
        raise UserError(f"keep={request.keep} must lie in 0 to 1: it is how much of the height stays.")
    height, width = source.shape[1:3]
    kept = round(request.keep * height / tok.downsample) * tok.downsample
    return _outside(tok, source, np.broadcast_to(np.arange(height)[:, None] >= kept, (height, width)))


def _edit(request: GenerationRequest, tok: "Tokenizer", source: np.ndarray) -> Known:
    if request.region is None:
        return _share(request, tok, source)
    region, (rows, columns) = request.region, source.shape[1:3]
    mask = np.zeros((rows, columns), bool)
    if len(region) != 4 or min(region) < 0 or not min(region[2:]):
        raise UserError(f"region={tuple(region)} must be top,left,height,width in pixels.")
    top, left, height, width = region
    if top + height > rows or left + width > columns:
        raise UserError(f"region={tuple(region)} does not lie within {rows} x {columns} pixels.")
    mask[top : top + height, left : left + width] = True
    return _outside(tok, source, mask)


def _share(request: GenerationRequest, tok: "Tokenizer", source: np.ndarray) -> Known:
    strength = MODES[request.mode].strength if request.strength is None else request.strength
    if not 0 <= strength <= 1:
        raise UserError(f"strength={strength} must lie in 0 to 1: it is the share of codes that are generated anew.")
    codes, grid = source_codes(tok, source)
    order = np.random.default_rng(request.seed).permutation(codes.shape[1])
    known = codes.copy()
    known[:, order[: round(strength * len(order))]] = UNKNOWN
    return Known(known, grid)


def restyled(captions: Sequence[str], style: str, source_style: str) -> list[str]:
    """Captions with one style's name in place of the other's; a caption that names neither gets it in front."""
    return [
        text.replace(source_style, style, 1) if source_style in text else text if style in text else f"{style} {text}"
        for text in captions
    ]


_IMAGES = {"images": "pictures to change"}
MODES: dict[str, Mode] = {
    "text_to_image": Mode({"prompts": "at least one prompt or class"}, takes=("classes", "grid")),
    "class_conditional": Mode({"classes": "at least one prompt or class"}, takes=("grid",)),
    "unconditional": Mode(takes=("grid",)),
    "inpaint": Mode(
        _IMAGES | {"mask": "a picture, light where new pixels go"}, takes=("prompts", "classes"), known=_inpaint
    ),
    "outpaint": Mode(
        _IMAGES | {"margins": "pixels at top,right,bottom,left, after resizing"},
        takes=("prompts", "classes"),
        known=_outpaint,
    ),
    "complete": Mode(_IMAGES, takes=("prompts", "classes", "keep"), known=_complete),
    "edit": Mode(
        _IMAGES | {"prompts": "what the picture is to show"}, takes=("classes", "region", "strength"), known=_edit
    ),
    "variations": Mode(_IMAGES, takes=("prompts", "classes", "strength"), known=_share),
    "style_transfer": Mode(
        _IMAGES | {"style": "name of the wanted style", "source_style": "name of the style that the captions have"},
        takes=("prompts", "classes", "strength"),
        known=_share,
        strength=1.0,
    ),
    "interpolate": Mode(
        {"prompts": "one to begin with", "second_prompt": "one to end with", "shares": "of the second, for each image"}
    ),
    "caption": Mode({"images": "pictures to describe"}, takes=("beams",)),
}
# Fields that belong to some modes only; all others are every mode's.
OWN = {name for mode in MODES.values() for name in (*mode.needs, *mode.takes)}
OF_IMAGES = [name for name, mode in MODES.items() if mode.known is not None]


def shares_of(frames: int) -> tuple[float, ...]:
    """How much of the second prompt is in each of so many images of an interpolation: 0 in the first, 1 in the last."""
    if frames < 2:
        raise UserError(f"frames={frames} must be at least 2: the first prompt's picture and the second's.")
    return tuple(float(share) for share in np.linspace(0, 1, frames, dtype=np.float32))
