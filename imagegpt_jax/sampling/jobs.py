"""What is to be decoded: prompts, known tokens and their positions, packed for the engine.

Shapes: B samples, N tokens to decode, G prompts of a sample.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from imagegpt_jax.data.packing import Layout
from imagegpt_jax.errors import UserError
from imagegpt_jax.sampling.settings import UNKNOWN, Sampling

Texts = Sequence[Sequence[int]]
Labels = Sequence[int] | np.ndarray
# A text encoder's output [B, P, E] and its mask [B, P].
Features = tuple[np.ndarray, np.ndarray]
Packed = dict[str, np.ndarray]  # what `Layout.prompt` returns


@dataclasses.dataclass(frozen=True)
class Job:
    """Samples to decode.

    Attributes:
      prompts: G packed prompts, each of B rows.
      without: the prompt of guidance, B rows; None without guidance.
      offsets: int32 [N, 3], see `engine.Settings`.
      start: first of the ids that may be drawn.
      size: how many there are.
      mix: float32 [B, G], shares of the prompts; None for one prompt.
      given: int32 [B, N], see `engine.Rows`.
      bias: float32 [size], see `engine.Settings`.
      any_order: whether tokens may be drawn in another order than that of `offsets`: codes of a picture, not words.
    """

    prompts: Sequence[Packed]
    without: Packed | None
    offsets: np.ndarray
    start: int
    size: int
    mix: np.ndarray | None = None
    given: np.ndarray | None = None
    bias: np.ndarray | None = None
    any_order: bool = False

    @property
    def total(self) -> int:
        """B."""
        return len(self.prompts[0]["tokens"])


def image_job(
    layout: Layout,
    prompts: Sequence[tuple[Texts | None, Labels | None]],
    sampling: Sampling,
    *,
    mix: np.ndarray | None = None,
    negative: Texts | None = None,
    given: np.ndarray | None = None,
    features: Sequence[Features] | None = None,
    negative_features: Features | None = None,
) -> Job:
    """The job of sampling the image codes of one picture for each prompt, 0 <= code < num_codes, in raster order.

    Args:
      layout: how the decoder was trained; another `grid` gives pictures of another shape.
      prompts: one (texts, labels), or G whose logits are mixed: token ids of each prompt, where an empty list is an
        unconditional picture, and the class of each sample, -1 for none. Either may be None.
      sampling: how to sample.
      mix: [B, G], the share of each prompt in the logits; for G > 1.
      negative: token ids of each sample's negative prompt; none by default.
      given: known codes [B, N], UNKNOWN (-1) where they are to be sampled.
      features: of each of the prompts, for a decoder with `feature_width`.
      negative_features: of the negative prompts; the learned ones of "no text" by default.

    Raises:
      UserError: if prompts do not fit the layout, or settings are out of range.
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
        if given.shape != (total, layout.num_codes) or given.min() < UNKNOWN or given.max() >= layout.space.num_codes:
            raise UserError(
                f"given codes are {UNKNOWN} (unknown) or 0 to {layout.space.num_codes - 1}, of shape"
                f" {(total, layout.num_codes)}; these are {given.shape}, {given.min()} to {given.max()}."
            )
    start, size = layout.image_ids
    if len(packed) > 1 or mix is not None:
        mix = np.asarray(mix, np.float32)
        if mix.shape != (total, len(packed)) or not np.allclose(mix.sum(1), 1, atol=1e-5):
            raise UserError(f"mix gives each of {total} samples shares of {len(packed)} prompts that sum to 1.")
    return Job(packed, without, layout.image_offsets(), start, size, mix, given, any_order=True)


def _shown(features: Features) -> dict[str, np.ndarray]:
    return {"features": np.asarray(features[0]), "feature_mask": np.asarray(features[1], bool)}


def caption_job(layout: Layout, codes_BN: np.ndarray, sampling: Sampling) -> Job:
    """The job of sampling a caption for each picture.

    Raises UserError if the codes do not fit the layout, the layout has no text, or guidance is asked for.
    """
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
