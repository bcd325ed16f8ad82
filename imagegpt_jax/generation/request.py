"""From pictures, masks and words to sketches: what is kept of a picture, and what is drawn anew.

Shapes: B pictures, H W C image, N codes.
"""

from collections.abc import Sequence

import numpy as np

from imagegpt_jax.errors import UserError
from imagegpt_jax.generation.pipeline import Grid, Sketch, check_pair
from imagegpt_jax.inference.loading import Decoder, Tokenizer
from imagegpt_jax.sampling.engine import UNKNOWN


def inpaint(
    gpt: Decoder,
    tok: Tokenizer,
    images: np.ndarray,
    masks: np.ndarray,
    prompts: Sequence[str],
    classes: Sequence[int | str | None],
) -> Sketch:
    """The sketch of `inpaint`."""
    check_pair(gpt, tok)
    source, codes, grid = encoded(tok, images)
    masks = np.asarray(masks, bool)
    if masks.shape[-2:] != source.shape[1:3] or masks.ndim not in (2, 3):
        raise UserError(f"a mask has the pictures' height and width {source.shape[1:3]}, and this one {masks.shape}.")
    masks = np.broadcast_to(masks, source.shape[:3])
    touched = masks.reshape(len(masks), grid[0], tok.downsample, grid[1], tok.downsample).any((2, 4))
    given = np.where(touched.reshape(codes.shape), UNKNOWN, codes)
    return Sketch(prompts=prompts, classes=classes, given=given, grid=grid, source=source, fresh=masks)


def outpaint(
    gpt: Decoder,
    tok: Tokenizer,
    images: np.ndarray,
    margins: tuple[int, int, int, int],
    prompts: Sequence[str],
    classes: Sequence[int | str | None],
) -> Sketch:
    """The sketch of `outpaint`."""
    check_pair(gpt, tok)
    if len(margins) != 4 or any(m < 0 or m % tok.downsample for m in margins):
        raise UserError(f"margins={tuple(margins)} must be four multiples of {tok.downsample}: top,right,bottom,left.")
    source, codes, grid = encoded(tok, images)
    top, right, bottom, left = margins
    wide = np.pad(source, ((0, 0), (top, bottom), (left, right), (0, 0)))
    fresh = np.pad(np.zeros(source.shape[:3], bool), ((0, 0), (top, bottom), (left, right)), constant_values=True)
    cells = [(m // tok.downsample, n // tok.downsample) for m, n in ((top, bottom), (left, right))]
    given = np.pad(codes.reshape(-1, *grid), ((0, 0), *cells), constant_values=UNKNOWN)
    size = given.shape[1:]
    return Sketch(
        prompts=prompts, classes=classes, given=given.reshape(len(given), -1), grid=size, source=wide, fresh=fresh
    )


def lower_mask(tok: Tokenizer, images: np.ndarray, share: float) -> np.ndarray:
    """bool [H, W], set below the upper `share` of a picture's rows of codes."""
    if not 0 <= share <= 1:
        raise UserError(f"share={share} must lie in 0 to 1: it is how much of the height stays.")
    height, width = np.shape(images)[1:3]
    kept = round(share * height / tok.downsample) * tok.downsample
    return np.broadcast_to(np.arange(height)[:, None] >= kept, (height, width))


def variations(
    gpt: Decoder,
    tok: Tokenizer,
    images: np.ndarray,
    strength: float,
    prompts: Sequence[str],
    classes: Sequence[int | str | None],
    seed: int,
) -> Sketch:
    """The sketch of `variations`."""
    check_pair(gpt, tok)
    if not 0 <= strength <= 1:
        raise UserError(f"strength={strength} must lie in 0 to 1: it is the share of codes that are drawn anew.")
    _, codes, grid = encoded(tok, images)
    order = np.random.default_rng(seed).permutation(codes.shape[1])
    given = codes.copy()
    given[:, order[: round(strength * len(order))]] = UNKNOWN
    return Sketch(prompts=prompts, classes=classes, given=given, grid=grid)


def region_mask(images: np.ndarray, region: Sequence[int]) -> np.ndarray:
    """bool [H, W], set in (top, left, height, width)."""
    rows, columns = np.asarray(images).shape[1:3]
    mask = np.zeros((rows, columns), bool)
    if len(region) != 4 or min(region) < 0 or not min(region[2:]):
        raise UserError(f"region={tuple(region)} must be top,left,height,width in pixels.")
    top, left, height, width = region
    if top + height > rows or left + width > columns:
        raise UserError(f"region={tuple(region)} does not lie within {rows} x {columns} pixels.")
    mask[top : top + height, left : left + width] = True
    return mask


def restyled(captions: Sequence[str], style: str, source_style: str) -> list[str]:
    """Captions with one style's name in place of the other's; a caption that names neither gets it in front."""
    return [
        text.replace(source_style, style, 1) if source_style in text else text if style in text else f"{style} {text}"
        for text in captions
    ]


def interpolation(first: str, second: str, frames: int) -> Sketch:
    """The sketch of `interpolate`."""
    if frames < 2:
        raise UserError(f"frames={frames} must be at least 2: the first prompt's picture and the second's.")
    shares = np.linspace(0, 1, frames, dtype=np.float32)
    return Sketch(prompts=[first] * frames, classes=[None] * frames, second=[second] * frames, shares=shares)


def encoded(tok: Tokenizer, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, Grid]:
    """(uint8 [B, H, W, C], codes [B, N], grid) of pictures."""
    source = np.asarray(images)
    if source.ndim != 4 or source.dtype != np.uint8:
        raise UserError(f"pictures are uint8 [B, H, W, C], and these are {source.dtype} {source.shape}.")
    if source.shape[1] % tok.downsample or source.shape[2] % tok.downsample:
        raise UserError(f"height and width {source.shape[1:3]} must be multiples of {tok.downsample}: resize or crop.")
    return source, tok.encode(source), (source.shape[1] // tok.downsample, source.shape[2] // tok.downsample)
