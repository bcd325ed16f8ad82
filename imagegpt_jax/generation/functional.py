"""What a notebook calls on arrays: images from words, from pictures and from parts of them, and words from pictures.

Each is a request of one mode (`modes.MODES`) to a `Pipeline`. Pictures are uint8 [B, H, W, C], or what Pillow opens, or
paths; a prompt or class is one for all or one for each. Options are those of `arguments.Options` in every signature.

Shapes: B pictures, H W C image, C captions.
"""

from collections.abc import Sequence
from typing import Unpack

import numpy as np

from imagegpt_jax.generation import modes
from imagegpt_jax.generation.arguments import Options, Pictures, SamplingOptions, Words, mode_of, request, with_options
from imagegpt_jax.generation.pipeline import Pipeline, layout_of
from imagegpt_jax.inference.loading import Decoder, Tokenizer, load_decoder
from imagegpt_jax.sampling.jobs import Features
from imagegpt_jax.sampling.likelihood import log_likelihood


@with_options
def generate(
    gpt: Decoder,
    tok: Tokenizer,
    prompts: Words = None,
    *,
    grid: modes.Grid | None = None,
    features: Features | None = None,
    **options: Unpack[Options],
) -> np.ndarray:
    """Generates images for prompts or classes.

    Args:
      prompts: any text; an empty one is an unconditional image.
      grid: (rows, columns) of codes, for images of another aspect ratio than the decoder was trained on.
      features: a text encoder's output [B, P, E] for each prompt and its mask [B, P], as `Decoder.text_features` gives
        them, for a decoder that has them before its codes.

    Returns:
      uint8 [B, H, W, C], B = prompts x num_images: all images of the first prompt, then those of the second.
    """
    mode = mode_of({"prompts": prompts, "classes": options.get("classes")})
    mode = "text_to_image" if mode == "unconditional" else mode
    return Pipeline(gpt, tok).ask(mode, options, prompts=prompts, grid=grid, features=features).pixels


@with_options
def inpaint(
    gpt: Decoder, tok: Tokenizer, images: Pictures, masks: Pictures, prompts: Words = None, **options: Unpack[Options]
) -> np.ndarray:
    """Generates a part of pictures anew.

    Args:
      masks: bool [H, W] or [B, H, W], where new pixels go. A code is generated anew if any of its pixels is.

    Returns:
      uint8 [B * num_images, H, W, C]; outside the mask the pixels of `images`.
    """
    return Pipeline(gpt, tok).ask("inpaint", options, images=images, mask=masks, prompts=prompts).pixels


@with_options
def outpaint(
    gpt: Decoder,
    tok: Tokenizer,
    images: Pictures,
    margins: tuple[int, int, int, int],
    prompts: Words = None,
    **options: Unpack[Options],
) -> np.ndarray:
    """Generates what lies around pictures.

    Args:
      margins: pixels to add at the top, right, bottom and left: multiples of `tok.downsample`.

    Returns:
      uint8 [B * num_images, top + H + bottom, left + W + right, C]; within the pixels of `images`.
    """
    return Pipeline(gpt, tok).ask("outpaint", options, images=images, margins=tuple(margins), prompts=prompts).pixels


@with_options
def complete(
    gpt: Decoder,
    tok: Tokenizer,
    images: Pictures,
    share: float = 0.5,
    prompts: Words = None,
    **options: Unpack[Options],
) -> np.ndarray:
    """Generates the lower part of pictures anew, as in ImageGPT's demonstration.

    Args:
      share: how much of the height stays, rounded to whole rows of codes; 0 to 1.

    Returns:
      uint8 [B * num_images, H, W, C]; above, the pixels of `images`.
    """
    return Pipeline(gpt, tok).ask("complete", options, images=images, keep=share, prompts=prompts).pixels


@with_options
def variations(
    gpt: Decoder,
    tok: Tokenizer,
    images: Pictures,
    strength: float = 0.5,
    prompts: Words = None,
    **options: Unpack[Options],
) -> np.ndarray:
    """Generates a random share of the codes of pictures anew; with other prompts, an edit of the whole picture.

    Args:
      strength: share of codes generated anew, 0 to 1; which ones depends on the seed alone.

    Returns:
      uint8 [B * num_images, H, W, C].
    """
    return Pipeline(gpt, tok).ask("variations", options, images=images, strength=strength, prompts=prompts).pixels


@with_options
def edit(
    gpt: Decoder,
    tok: Tokenizer,
    images: Pictures,
    prompts: Words,
    *,
    region: tuple[int, int, int, int] | None = None,
    strength: float = 0.5,
    **options: Unpack[Options],
) -> np.ndarray:
    """Generates pictures under another prompt and keeps a part of them: all but a region, or a share of the codes.

    Args:
      region: (top, left, height, width) in pixels, generated anew; all other pixels stay.
      strength: without a region, the share of codes generated anew.

    Returns:
      uint8 [B * num_images, H, W, C].
    """
    return (
        Pipeline(gpt, tok).ask("edit", options, images=images, prompts=prompts, region=region, strength=strength).pixels
    )


@with_options
def style_transfer(
    gpt: Decoder,
    tok: Tokenizer,
    images: Pictures,
    style: str,
    source_style: str,
    captions: Words = None,
    strength: float = 1.0,
    **options: Unpack[Options],
) -> np.ndarray:
    """Generates what pictures show in another style that the decoder knows by name.

    The words of each picture, given or written by the decoder itself, get the other style's name.

    Args:
      style: name of the wanted style, such as "twemoji".
      source_style: name of the pictures' style, such as "noto", as their captions have it.
      captions: of the pictures; None lets the decoder write them, for one trained with `config.data.image_to_text`.
      strength: share of codes generated anew; below 1 some of the picture's own stay.

    Returns:
      uint8 [B * num_images, H, W, C].
    """
    fields = {"style": style, "source_style": source_style, "strength": strength}
    return Pipeline(gpt, tok).ask("style_transfer", options, images=images, prompts=captions, **fields).pixels


@with_options
def interpolate(
    gpt: Decoder, tok: Tokenizer, first: str, second: str, frames: int = 8, **options: Unpack[Options]
) -> np.ndarray:
    """Generates a series from one prompt to another: their logits are mixed, and all have the same random numbers.

    Args:
      first: prompt of the first image.
      second: prompt of the last.
      frames: images of the series, at least 2.

    Returns:
      uint8 [frames * num_images, H, W, C].
    """
    shares = modes.shares_of(frames)
    return Pipeline(gpt, tok).ask("interpolate", options, prompts=first, second_prompt=second, shares=shares).pixels


@with_options
def caption(
    gpt: Decoder,
    tok: Tokenizer,
    images: Pictures,
    *,
    num_captions: int = 1,
    seed: int = 0,
    beams: int = 0,
    **options: Unpack[SamplingOptions],
) -> list[str]:
    """Writes captions of pictures, with a decoder trained with `config.data.image_to_text`.

    Args:
      images: the pictures, of the decoder's own size.
      num_captions: captions of each picture.
      seed: caption i depends only on (seed, i).
      beams: search for the likeliest captions with so many beams instead of sampling; 0 = sample.
      **options: see `Sampling`; greedy by default. With beams, `weights` alone.

    Returns:
      B * num_captions texts: all of the first picture, then those of the second; with beams the likeliest first.

    Raises:
      UserError: for a decoder without words, fewer beams than captions, and as `generate`.
    """
    pipeline = Pipeline(gpt, tok)
    fields = {"images": images, "num_images": num_captions, "seed": seed, "beams": beams}
    made, how = request("caption", pipeline.size, options, **fields)
    return pipeline.captions(made, **how)


def rank_captions(
    gpt: Decoder, tok: Tokenizer, images: Pictures, captions: Sequence[str], *, of: str = "image"
) -> np.ndarray:
    """How likely each caption is for each picture.

    Args:
      images: the pictures, of the decoder's own size.
      captions: C texts.
      of: "image": log P(picture | caption); "text": log P(caption | picture), for a decoder trained with
        `config.data.image_to_text`.

    Returns:
      float32 [B, C], nats.

    Raises:
      UserError: as `generate`.
    """
    pipeline = Pipeline(gpt, tok)
    made, _ = request("caption", pipeline.size, {}, images=images)
    codes, grid = modes.source_codes(tok, pipeline.sources(made))
    texts, every = [gpt.encode_text(text) for text in captions] * len(codes), np.repeat(codes, len(captions), axis=0)
    seen = gpt.read(list(captions) * len(codes))
    scores = log_likelihood(gpt.gpt, layout_of(gpt, grid), texts, None, every, of=of, features=seen)
    return scores.reshape(len(codes), len(captions))


def load_pipeline(name: str, step: int | None = None, *, tokenizer: str | None = None) -> Pipeline:
    """Loads a decoder with its image tokenizer, ready to make images: `load_pipeline(NAME)("a red heart").images`.

    Args:
      name: workdir of a decoder's training run, a portable folder, or published weights.
      step: checkpoint of a run; the newest by default.
      tokenizer: the image tokenizer, if it is not where the decoder's config says.

    Raises:
      UserError: if there is no such decoder or tokenizer.
    """
    decoder = load_decoder(name, step, tokenizer=tokenizer)
    return Pipeline(decoder, decoder.load_tokenizer())
