"""How likely a decoder finds given pictures and given words: one full pass, in fixed-size batches.

Shapes: B examples, L sequence, N codes.
"""

import functools
from collections.abc import Sequence as List

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagegpt_jax.data.packing import IMAGE, IMAGE_TO_TEXT, TEXT, TEXT_TO_IMAGE, Layout
from imagegpt_jax.errors import UserError
from imagegpt_jax.models import layers
from imagegpt_jax.models.gpt import GPT, Sequence
from imagegpt_jax.parallel import padding

BATCH_SIZE = 16  # examples in one pass
FEATURES = ("features", "feature_mask")


@functools.partial(jax.jit, static_argnames=("start", "size", "kind"))
def _log_likelihood(gpt: GPT, batch: dict[str, Array], *, start: int, size: int, kind: int) -> Float[Array, " B"]:
    hidden_BLD = gpt(Sequence.from_batch(batch)).hidden
    logits_BLV = layers.score(hidden_BLD, gpt.output_table(start, size))
    wanted_BL = batch["kind"] == kind
    targets_BL = jnp.where(wanted_BL, batch["targets"] - start, 0)
    log_probs_BL = jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), targets_BL[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(wanted_BL, log_probs_BL, 0), axis=1)


def log_likelihood(
    gpt: GPT,
    layout: Layout,
    texts: List[List[int]] | None,
    labels: List[int] | np.ndarray | None,
    codes_BN: np.ndarray,
    *,
    of: str = "image",
    features: tuple[np.ndarray, np.ndarray] | None = None,
) -> Float[np.ndarray, " B"]:
    """log P(image | words), or log P(words | image), in nats, without guidance.

    Args:
      gpt: the decoder, as trained.
      layout: how it was trained.
      texts, labels, codes_BN: token ids of each example, its class, and its codes.
      of: "image" (given the words) or "text" (given the image; with its end).
      features: a text encoder's output [B, P, E] and its mask [B, P], for a decoder with `feature_width`.

    Raises:
      UserError: if the examples do not fit the layout, `of` is neither, or the decoder writes no words.
    """
    if of not in ("image", "text"):
        raise UserError(f"of={of!r} must be 'image' or 'text'.")
    if of == "text" and not layout.space.text_vocab:
        raise UserError("this decoder writes no words: ask for of='image'.")
    direction, kind = (TEXT_TO_IMAGE, IMAGE) if of == "image" else (IMAGE_TO_TEXT, TEXT)
    start, size = layout.image_ids if of == "image" else layout.text_ids
    total = len(codes_BN)
    packed = layout.pack(texts, labels, codes_BN, np.full(total, direction))
    names = ["tokens", "positions", "segments", "target_positions", "condition", "targets", "kind"]
    if features is not None:
        packed |= dict(zip(FEATURES, features, strict=True))
        names += FEATURES
    out_B = np.zeros(total, np.float32)
    for part, rows in padding.padded_batches(total, BATCH_SIZE):
        batch = {name: packed[name][rows] for name in names if name in packed}
        scores_B = _log_likelihood(gpt, batch, start=start, size=size, kind=kind)
        out_B[part] = np.asarray(scores_B)[: part.stop - part.start]
    return out_B
