"""Sampling, as everything else calls it: lists in, arrays out. The parts are in `imagegpt_jax/sampling/`.

Shapes: B samples, N tokens to decode, G prompts of a sample.
"""

from collections import abc
from typing import Any

import numpy as np
from jaxtyping import Int

from imagegpt_jax.data.packing import Layout
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt import GPT
from imagegpt_jax.sampling.batching import TILE, Drawn, Job, place, run
from imagegpt_jax.sampling.decode_weights import prepare
from imagegpt_jax.sampling.engine import FREE, extend, prefill, step
from imagegpt_jax.sampling.settings import Sampling
from imagegpt_jax.sampling.token_sampling import Filters, choose

__all__ = [
    "FREE",
    "TILE",
    "Drawn",
    "Filters",
    "Sampling",
    "caption_job",
    "choose",
    "extend",
    "generate_codes",
    "generate_text",
    "image_job",
    "place",
    "prefill",
    "prepare",
    "run",
    "step",
]

Texts = abc.Sequence[abc.Sequence[int]]
Labels = abc.Sequence[int] | np.ndarray
# A text encoder's output [B, P, E] and its mask [B, P].
Features = tuple[np.ndarray, np.ndarray]


def generate_codes(
    gpt: GPT,
    layout: Layout,
    texts: Texts | None,
    labels: Labels | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    *,
    negative: Texts | None = None,
    given: np.ndarray | None = None,
    features: Features | None = None,
    **how: Any,
) -> Int[np.ndarray, "B N"]:
    """Samples the image codes of one picture for each prompt.

    Args:
      gpt: the decoder, as trained or from `place`.
      layout: how it was trained; another `grid` gives pictures of another shape.
      texts: token ids of each prompt; an empty list is an unconditional picture. `None` where only labels are given.
      labels: class of each sample, -1 or `None` for none.
      sampling: how to draw; `None` for the defaults.
      seed: with the sample's index, all that its draws depend on.
      negative: token ids of what guidance leads away from, for each sample; none by default.
      given: codes [B, N] that are not drawn but taken over, FREE (-1) elsewhere.
      features: a text encoder's output [B, P, E] and its mask [B, P], for a decoder with `feature_width`.
      **how: `sample_indices`, `tile`, `mesh`, `progress`, `on_step` of `sampling.batching.run`.

    Returns:
      codes in raster order, 0 <= code < num_codes.

    Raises:
      UserError: if prompts do not fit the layout, or settings are out of range.
    """
    sampling = sampling or Sampling()
    shown = None if features is None else [features]
    job = image_job(layout, [(texts, labels)], sampling, negative=negative, given=given, features=shown)
    return run(gpt, job, sampling, seed, **how).tokens


def image_job(
    layout: Layout,
    prompts: abc.Sequence[tuple[Texts | None, Labels | None]],
    sampling: Sampling,
    *,
    mix: np.ndarray | None = None,
    negative: Texts | None = None,
    given: np.ndarray | None = None,
    features: abc.Sequence[Features] | None = None,
    negative_features: Features | None = None,
) -> Job:
    """What `run` needs to draw pictures; arguments as in `generate_codes`.

    Args:
      layout: of the sequences.
      prompts: one (texts, labels), or G whose logits are mixed.
      sampling: how to draw.
      mix: [B, G], the share of each prompt in the logits; for G > 1.
      negative: see `generate_codes`.
      given: see `generate_codes`.
      features: of each of the prompts, see `generate_codes`.
      negative_features: of what guidance leads away from; the learned ones of "no text" by default.

    Raises:
      UserError: as `generate_codes`.
    """
    packed = [layout.prompt(texts, labels) for texts, labels in prompts]
    total = len(packed[0]["tokens"])
    if negative is not None and not sampling.guided:
        raise UserError("a negative prompt acts through guidance: give a cfg_scale other than 1.")
    without = layout.prompt([[]] * total if negative is None else negative) if sampling.guided else None
    if features is not None:
        packed = [p | _shown(f) for p, f in zip(packed, features, strict=True)]
        if without is not None:  # rows without a real feature get the learned ones
            values, mask = features[0]
            without |= _shown(negative_features or (values, np.zeros_like(mask)))
    if given is not None:
        given = np.asarray(given, np.int32).reshape(len(given), -1)
        if given.shape != (total, layout.num_codes) or given.min() < FREE or given.max() >= layout.space.num_codes:
            raise UserError(
                f"given codes are {FREE} (free) or 0 to {layout.space.num_codes - 1}, of shape"
                f" {(total, layout.num_codes)}; these are {given.shape}, {given.min()} to {given.max()}."
            )
    start, size = layout.image_ids
    shares = _shares(mix, total, len(packed))
    return Job(packed, without, layout.image_offsets(), start, size, shares, given, any_order=True)


def _shown(features: Features) -> dict[str, np.ndarray]:
    return {"features": np.asarray(features[0]), "feature_mask": np.asarray(features[1], bool)}


def _shares(mix: np.ndarray | None, total: int, prompts: int) -> np.ndarray | None:
    if prompts == 1 and mix is None:
        return None
    shares_BG = np.asarray(mix, np.float32)
    if shares_BG.shape != (total, prompts) or not np.allclose(shares_BG.sum(1), 1, atol=1e-5):
        raise UserError(f"mix gives each of {total} samples shares of {prompts} prompts that sum to 1.")
    return shares_BG


def generate_text(
    gpt: GPT, layout: Layout, codes_BN: np.ndarray, sampling: Sampling | None = None, seed: int = 0, **how: Any
) -> list[list[int]]:
    """Samples a caption (text ids, without specials) for each picture; arguments as in `generate_codes`.

    Raises:
      UserError: if the codes do not fit the layout, the layout has no text, or guidance is asked for.
    """
    sampling = sampling or Sampling()
    job = caption_job(layout, codes_BN, sampling)
    return [until_end(layout, ids_T) for ids_T in run(gpt, job, sampling, seed, **how).tokens]


def caption_job(layout: Layout, codes_BN: np.ndarray, sampling: Sampling) -> Job:
    """What `run` needs to write captions; errors as `generate_text`."""
    if sampling.guided:
        raise UserError("captions are sampled without guidance: leave cfg_scale at 1.")
    if not layout.space.text_vocab:
        raise UserError("this decoder was trained without text, so it cannot write captions.")
    space = layout.space
    offsets_T3 = np.repeat(np.arange(layout.text_length, dtype=np.int32)[:, None], 3, axis=1)
    bias_V = np.zeros(space.eot + 1, np.float32)
    bias_V[[space.pad, space.boi, space.eoi]] = -np.inf
    return Job([layout.caption_prompt(codes_BN)], None, offsets_T3, 0, bias_V.size, bias=bias_V)


def until_end(layout: Layout, ids_T: np.ndarray) -> list[int]:
    """The ids of a caption before its <eot>."""
    (ends,) = np.nonzero(ids_T == layout.space.eot)
    return ids_T[: ends[0] if ends.size else None].tolist()
