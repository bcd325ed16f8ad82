"""Pixels as logits that are Laplace distributed (arXiv:2102.12092, appendix A.3); the loss is `losses.basic`'s."""

import jax
from jaxtyping import Array, Float

from imagegpt_jax.models import layers

# Pixels keep this far from 0 and 1, where logits are infinite.
MARGIN = 0.1


def pixels(mean: Float[Array, "..."]) -> Float[Array, "..."]:
    """The pixels, around [-1, 1], whose logits are `mean`."""
    mean = mean.astype(layers.accumulation_dtype(mean.dtype))
    return 2 * (jax.nn.sigmoid(mean) - MARGIN) / (1 - 2 * MARGIN) - 1
