"""Losses as pure functions, computed in float32 (or float64) and averaged over the batch unless said otherwise.

Shapes: B batch, H W pixels, C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagegpt_jax.models import layers
from imagegpt_jax.models import logit_laplace as logit_laplace_lib


def _wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(layers.accumulation_dtype(x.dtype))


def l1(x: Float[Array, "..."], target: Float[Array, "..."]) -> Float[Array, ""]:
    """Mean absolute error."""
    return jnp.mean(jnp.abs(_wide(x) - _wide(target)))


def l2(x: Float[Array, "..."], target: Float[Array, "..."]) -> Float[Array, ""]:
    """Mean squared error."""
    return jnp.mean(jnp.square(_wide(x) - _wide(target)))


# Losses of (reconstructions, images), both [B, H, W, C] in [-1, 1]: the keys of `config.loss` that weigh them. Your own
# is "module:name" in `config.loss.others`.
PIXEL_LOSSES = {"l1": l1, "l2": l2}


def logit_laplace(
    mean: Float[Array, "..."], log_scale: Float[Array, "..."], images: Float[Array, "..."]
) -> Float[Array, ""]:
    """Mean negative log likelihood of pixels, in nats, whose logits are Laplace distributed (arXiv:2102.12092, A.3).

    A pixel in [-1, 1] is first mapped to x in [0.1, 0.9]; then -log p(x) = |logit(x) - mean| / b + log(2 b x (1 - x)),
    with b = exp(log_scale).
    """
    x = (1 - 2 * logit_laplace_lib.MARGIN) * (_wide(images) + 1) / 2 + logit_laplace_lib.MARGIN
    distance = jnp.abs(jnp.log(x) - jnp.log1p(-x) - _wide(mean))
    return jnp.mean(distance * jnp.exp(-_wide(log_scale)) + _wide(log_scale) + jnp.log(2 * x * (1 - x)))


def hinge_discriminator(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """(E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))]) / 2 (arXiv:1705.02894; the half is VQGAN's)."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def hinge_generator(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """-E[D(fake)], the generator's side of the hinge loss."""
    return -jnp.mean(fake)


def nonsaturating_discriminator(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """(E[softplus(-D(real))] + E[softplus(D(fake))]) / 2 (Goodfellow 2014, arXiv:1406.2661, with logits)."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


def nonsaturating_generator(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """E[softplus(-D(fake))]: minus log of the probability of being taken for real."""
    return jnp.mean(jax.nn.softplus(-fake))


@dataclasses.dataclass(frozen=True)
class GanLoss:
    """An adversarial loss.

    Attributes:
      generator: logits of generated images -> its loss.
      discriminator: (logits of real images, logits of generated images) -> its loss.
    """

    generator: Callable[[Float[Array, "..."]], Float[Array, ""]]
    discriminator: Callable[[Float[Array, "..."], Float[Array, "..."]], Float[Array, ""]]


# What `config.loss.gan_kind` names; your own is "module:name" of a `GanLoss`.
GAN_LOSSES = {
    "hinge": GanLoss(hinge_generator, hinge_discriminator),
    "non_saturating": GanLoss(nonsaturating_generator, nonsaturating_discriminator),
    # As in Open-MAGVIT2 and IBQ.
    "non_saturating_hinge": GanLoss(nonsaturating_generator, hinge_discriminator),
}


def lecam(
    real: Float[Array, "..."], fake: Float[Array, "..."], average_real: Float[Array, ""], average_fake: Float[Array, ""]
) -> Float[Array, ""]:
    """E[max(0, D(real) - a_F)^2] + E[max(0, a_R - D(fake))^2], a regulariser of discriminators (arXiv:2104.03310).

    `real` and `fake` are logits, a_R and a_F moving averages of their means.
    """
    return jnp.mean(jnp.square(jax.nn.relu(real - average_fake))) + jnp.mean(
        jnp.square(jax.nn.relu(average_real - fake))
    )


def r1(gradients_BHWC: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """E[|dD/dimage|^2] / 2 over real images (Mescheder 2018, arXiv:1801.04406; gamma is the caller's weight).

    The gradients are those of the sum of the logits with respect to the real images.
    """
    return 0.5 * jnp.mean(jnp.sum(jnp.square(_wide(gradients_BHWC)), axis=(1, 2, 3)))


def adaptive_weight(rec_grad: Any, gan_grad: Any) -> Float[Array, ""]:
    """|rec_grad| / (|gan_grad| + 1e-4), at most 1e4, without gradient (VQGAN, arXiv:2012.09841, equation 7, as coded).

    Gradients, arrays or trees of them, of the reconstruction (and perceptual) and of the generator's adversarial loss
    with respect to the kernel of the decoder's last layer.
    """
    weight = _norm(rec_grad) / (_norm(gan_grad) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(weight, 0.0, 1e4))


def _norm(tree: Any) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(jnp.square(_wide(x))) for x in jax.tree.leaves(tree)))
