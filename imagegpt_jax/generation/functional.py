"""What a notebook calls: pictures from words, from pictures and from parts of them, and words from pictures.

Shapes: B pictures, H W C image, C captions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import request
from imagegpt_jax.generation.pipeline import Grid, Sketch, best, check_pair, draw, layout_of
from imagegpt_jax.inference.loading import Decoder, Tokenizer
from imagegpt_jax.sampling import beam
from imagegpt_jax.sampling.batching import run
from imagegpt_jax.sampling.jobs import caption_job, until_end
from imagegpt_jax.sampling.likelihood import log_likelihood
from imagegpt_jax.sampling.settings import Sampling

Words = str | Sequence[str] | None
Classes = int | str | Sequence[int | str | None] | None


def generate(
    gpt: Decoder,
    tok: Tokenizer,
    prompts: Words = None,
    *,
    classes: Classes = None,
    num_images: int = 1,
    seed: int = 0,
    grid: Grid | None = None,
    features: tuple[np.ndarray, np.ndarray] | None = None,
    **how: Any,
) -> np.ndarray:
    """Draws pictures for prompts or classes.

    Args:
      gpt: a decoder, from `load_decoder`.
      tok: the image tokenizer that it was trained with, from `load_tokenizer` or `gpt.load_tokenizer()`.
      prompts: any text; an empty one draws unconditionally.
      classes: names or numbers, for a decoder trained on classes; beside prompts, one for each.
      num_images: pictures of each prompt.
      seed: the draws of picture i depend on (seed, i) alone.
      grid: (rows, columns) of codes, for pictures of another shape than the decoder was trained on.
      features: a text encoder's output [B, P, E] for each prompt and its mask [B, P], as `Decoder.text_features` gives
        them, for a decoder that has them before its codes.
      **how: settings of `sampling.settings.Sampling` (`temperature`, `top_k`, `cfg_scale`, ...), None for those of the
        decoder's config; `negative`, a text or one for each prompt, that guidance leads away from; `best_of` and
        `scorer`, to keep the best `num_images` of so many (`sampling.scorers`); `on_step`, `mesh` and `tile` of
        `generation.pipeline.draw`.

    Returns:
      uint8 [B, H, W, C], B = prompts x num_images: all pictures of the first prompt, then those of the second.

    Raises:
      UserError: for arguments that are out of range or do not fit the decoder.
    """
    texts, labels = _asked(prompts, classes)
    values, mask = features or (None, None)
    sketch = Sketch(prompts=texts, classes=labels, grid=grid, features=values, feature_mask=mask)
    return _collect(gpt, tok, sketch, {"num_images": num_images, "seed": seed, **how})


def inpaint(
    gpt: Decoder, tok: Tokenizer, images: np.ndarray, masks: np.ndarray, prompts: Words = None, **how: Any
) -> np.ndarray:
    """Draws a part of pictures anew.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      images: uint8 [B, H, W, C].
      masks: bool [H, W] or [B, H, W], where new pixels go. A code is drawn anew if any of its pixels is.
      prompts: what to draw there: one text, or one for each picture; nothing by default.
      **how: as in `generate`, with `classes`, `num_images` and `seed`.

    Returns:
      uint8 [B * num_images, H, W, C]; outside the mask the pixels of `images`.

    Raises:
      UserError: for arguments that do not fit each other or the decoder.
    """
    texts, labels = _asked(prompts, how.pop("classes", None), len(images))
    return _collect(gpt, tok, request.inpaint(gpt, tok, images, masks, texts, labels), how)


def outpaint(
    gpt: Decoder,
    tok: Tokenizer,
    images: np.ndarray,
    margins: tuple[int, int, int, int],
    prompts: Words = None,
    **how: Any,
) -> np.ndarray:
    """Draws what lies around pictures.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      images: uint8 [B, H, W, C].
      margins: pixels to add at the top, right, bottom and left: multiples of `tok.downsample`.
      prompts: what to draw there: one text, or one for each picture; nothing by default.
      **how: as in `generate`, with `classes`, `num_images` and `seed`.

    Returns:
      uint8 [B * num_images, top + H + bottom, left + W + right, C]; within the pixels of `images`.

    Raises:
      UserError: for arguments that do not fit each other or the decoder.
    """
    texts, labels = _asked(prompts, how.pop("classes", None), len(images))
    return _collect(gpt, tok, request.outpaint(gpt, tok, images, margins, texts, labels), how)


def complete(
    gpt: Decoder, tok: Tokenizer, images: np.ndarray, share: float = 0.5, prompts: Words = None, **how: Any
) -> np.ndarray:
    """Draws the lower part of pictures anew, as in ImageGPT's demonstration.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      images: uint8 [B, H, W, C].
      share: how much of the height stays, rounded to whole rows of codes; 0 to 1.
      prompts: what they show: one text, or one for each picture; nothing by default.
      **how: as in `inpaint`.

    Returns:
      uint8 [B * num_images, H, W, C]; above, the pixels of `images`.

    Raises:
      UserError: for arguments that do not fit each other or the decoder.
    """
    return inpaint(gpt, tok, images, request.lower_mask(tok, images, share), prompts, **how)


def variations(
    gpt: Decoder, tok: Tokenizer, images: np.ndarray, strength: float = 0.5, prompts: Words = None, **how: Any
) -> np.ndarray:
    """Draws a random share of the codes of pictures anew; with other prompts, an edit of the whole picture.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      images: uint8 [B, H, W, C].
      strength: share of codes drawn anew, 0 to 1; which ones depends on the seed alone.
      prompts: what to draw: one text, or one for each picture; nothing by default.
      **how: as in `generate`, with `classes`, `num_images` and `seed`.

    Returns:
      uint8 [B * num_images, H, W, C].

    Raises:
      UserError: for arguments that do not fit each other or the decoder.
    """
    texts, labels = _asked(prompts, how.pop("classes", None), len(images))
    sketch = request.variations(gpt, tok, images, strength, texts, labels, how.get("seed", 0))
    return _collect(gpt, tok, sketch, how)


def edit(
    gpt: Decoder,
    tok: Tokenizer,
    images: np.ndarray,
    prompts: Words,
    *,
    region: tuple[int, int, int, int] | None = None,
    strength: float = 0.5,
    **how: Any,
) -> np.ndarray:
    """Draws pictures under another prompt and keeps a part of them: all but a region, or a share of the codes.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      images: uint8 [B, H, W, C].
      prompts: what they are to show: one text, or one for each picture.
      region: (top, left, height, width) in pixels, drawn anew; all other pixels stay.
      strength: without a region, the share of codes drawn anew.
      **how: as in `generate`, with `classes`, `num_images` and `seed`.

    Returns:
      uint8 [B * num_images, H, W, C].

    Raises:
      UserError: for arguments that do not fit each other or the decoder.
    """
    if region is None:
        return variations(gpt, tok, images, strength, prompts, **how)
    return inpaint(gpt, tok, images, request.region_mask(images, region), prompts, **how)


def style_transfer(
    gpt: Decoder,
    tok: Tokenizer,
    images: np.ndarray,
    style: str,
    source_style: str,
    captions: Words = None,
    strength: float = 1.0,
    **how: Any,
) -> np.ndarray:
    """Draws what pictures show in another style that the decoder knows by name.

    The words of each picture, given or written by the decoder itself, get the other style's name.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      images: uint8 [B, H, W, C].
      style: name of the wanted style, such as "twemoji".
      source_style: name of the pictures' style, such as "noto", as their captions have it.
      captions: of the pictures; None lets the decoder write them, for one trained with `config.data.image_to_text`.
      strength: share of codes drawn anew; below 1 some of the picture's own stay.
      **how: as in `variations`.

    Returns:
      uint8 [B * num_images, H, W, C].

    Raises:
      UserError: for captions that do not name the source's style, and as `variations`.
    """
    words = caption(gpt, tok, images) if captions is None else _asked(captions, None, len(images))[0]
    return variations(gpt, tok, images, strength, request.restyled(words, style, source_style), **how)


def interpolate(gpt: Decoder, tok: Tokenizer, first: str, second: str, frames: int = 8, **how: Any) -> np.ndarray:
    """Draws a series from one prompt to another: their logits are mixed, and all pictures have the same draws.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      first: prompt of the first picture.
      second: prompt of the last.
      frames: pictures of the series, at least 2.
      **how: as in `generate`, with `seed`.

    Returns:
      uint8 [frames, H, W, C].

    Raises:
      UserError: for arguments that are out of range or do not fit the decoder.
    """
    check_pair(gpt, tok)
    return _collect(gpt, tok, request.interpolation(first, second, frames), {"draws": [0] * frames, **how})


def caption(
    gpt: Decoder,
    tok: Tokenizer,
    images: np.ndarray,
    *,
    num_captions: int = 1,
    seed: int = 0,
    beams: int = 0,
    **how: Any,
) -> list[str]:
    """Writes captions of pictures, with a decoder trained with `config.data.image_to_text`.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      images: uint8 [B, H, W, C], of the decoder's own size.
      num_captions: captions of each picture.
      seed: the draws of caption i depend on (seed, i) alone.
      beams: search for the likeliest captions with so many beams instead of drawing; 0 = draw.
      **how: settings of `sampling.settings.Sampling`; greedy by default. With beams, `weights` alone.

    Returns:
      B * num_captions texts: all of the first picture, then those of the second; with beams the likeliest first.

    Raises:
      UserError: for a decoder without words, fewer beams than captions, and as `generate`.
    """
    check_pair(gpt, tok)
    if beams and (idle := sorted(how.keys() - {"weights"})):
        raise UserError(f"beams={beams} searches for the likeliest captions and draws none: leave {idle[0]} out.")
    if beams and num_captions > beams:
        raise UserError(f"{num_captions} captions of a picture need as many beams, and there are {beams}.")
    plain = {"temperature": 0.0 if num_captions == 1 else 1.0, "top_k": 0, "top_p": 1.0, "cfg_scale": 1.0}
    how = plain | {"tokens_per_step": 1} | how
    _, codes, grid = request.encoded(tok, images)
    layout, sampling = layout_of(gpt, grid), _settings(gpt, how)
    if beams:
        job = caption_job(layout, codes, sampling)
        found = beam.search(gpt.placed(), job, sampling, beams=beams, end=layout.space.eot)
        best_BT = found.tokens[:, :num_captions].reshape(-1, found.tokens.shape[2])
        ids = [until_end(layout, ids_T) for ids_T in best_BT]
    else:
        job = caption_job(layout, np.repeat(codes, num_captions, axis=0), sampling)
        ids = [until_end(layout, ids_T) for ids_T in run(gpt.placed(), job, sampling, seed, **how).tokens]
    return [gpt.setup.text.decode(text) for text in ids]


def rank_captions(
    gpt: Decoder, tok: Tokenizer, images: np.ndarray, captions: Sequence[str], *, of: str = "image"
) -> np.ndarray:
    """How likely each caption is for each picture.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      images: uint8 [B, H, W, C], of the decoder's own size.
      captions: C texts.
      of: "image": log P(picture | caption); "text": log P(caption | picture), for a decoder trained with
        `config.data.image_to_text`.

    Returns:
      float32 [B, C], nats.

    Raises:
      UserError: as `generate`.
    """
    check_pair(gpt, tok)
    _, codes, grid = request.encoded(tok, images)
    ids = [gpt.encode_text(text) for text in captions]
    codes_BCN = np.repeat(codes, len(ids), axis=0)
    seen = gpt.read(list(captions) * len(codes))
    scores = log_likelihood(gpt.gpt, layout_of(gpt, grid), ids * len(codes), None, codes_BCN, of=of, features=seen)
    return scores.reshape(len(codes), len(ids))


# ------------------------------------------------------------------------------------------------------------- parts


def _asked(prompts: Words, classes: Classes, count: int | None = None) -> tuple[list[str], list[int | str | None]]:
    """Texts and classes as lists of one length; `count` repeats a single one."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    labels: list[Any] = [classes] if isinstance(classes, int | str) else list(classes if classes is not None else ())
    if any(not isinstance(text, str) for text in texts):
        raise UserError("prompts are text.")
    if count is not None:
        texts, labels = (values * count if len(values) == 1 else values for values in (texts, labels))
        if not texts and not labels:
            texts = [""] * count
        if {len(texts), len(labels)} - {0, count}:
            raise UserError(f"there are {len(texts)} prompts and {len(labels)} classes for {count} pictures.")
    if texts and labels and len(texts) != len(labels):
        raise UserError(f"there are {len(texts)} prompts and {len(labels)} classes: give one class for each prompt.")
    return texts or [""] * len(labels), labels or [None] * len(texts)


def _settings(gpt: Decoder, how: dict[str, Any]) -> Sampling:
    """Takes the settings of `Sampling` out of keyword arguments."""
    names = {field.name for field in dataclasses.fields(Sampling)}
    return gpt.sampling(**{name: how.pop(name) for name in list(how) if name in names})


def _collect(gpt: Decoder, tok: Tokenizer, sketch: Sketch, how: dict[str, Any]) -> np.ndarray:
    """All pictures of a sketch."""
    check_pair(gpt, tok)
    sampling, seed, best_of = _settings(gpt, how), how.pop("seed", 0), how.pop("best_of", None)
    negative = how.pop("negative", None)
    if negative is not None:
        sketch = dataclasses.replace(sketch, negative=_asked(negative, None, len(sketch.prompts))[0])
    if best_of is not None:
        return best(gpt, tok, sketch, sampling, seed, best_of=best_of, **how)[0]
    return np.concatenate([part.images for part in draw(gpt, tok, sketch, sampling, seed, **how)])
