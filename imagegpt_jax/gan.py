"""Losses of the image tokenizer and their gradients on one batch: of the autoencoder, and of the discriminator.

Shapes: B batch, H W C image, h w code grid, Z code dimension, P codes of a vector.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagegpt_jax import losses, metrics
from imagegpt_jax import state as state_lib
from imagegpt_jax.config import choose
from imagegpt_jax.models.quantizers import UseSums
from imagegpt_jax.state import Network, TrainState

# Kind -> (generator's loss of fake logits, discriminator's loss of real and fake logits).
GAN_LOSSES = {
    "hinge": (losses.hinge_generator, losses.hinge_discriminator),
    "non_saturating": (losses.nonsaturating_generator, losses.nonsaturating_discriminator),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the tokenizer's losses.

    Attributes:
      l1: weight of the mean absolute error.
      l2: weight of the mean squared error.
      lpips: weight of the perceptual distance; 0 = off.
      lpips_weights: safetensors file made by `tools/convert_lpips.py`, needed if `lpips` > 0.
      gan: weight of the adversarial loss on the generator.
      gan_kind: "hinge" or "non_saturating".
      gan_start: step from which the discriminator takes part; negative = never.
      adaptive: scale the adversarial loss by the ratio of gradient norms at the last layer (arXiv:2012.09841, eq. 7).
    """

    l1: float
    l2: float
    lpips: float
    lpips_weights: str
    gan: float
    gan_kind: str
    gan_start: int
    adaptive: bool

    def __post_init__(self):
        choose("gan_kind", self.gan_kind, GAN_LOSSES)


class Sums(NamedTuple):
    """What adds up over the parts of a batch.

    Attributes:
      gradients: network -> gradient of the mean of its loss.
      use: of the codes.
    """

    gradients: dict[str, state_lib.Params]
    use: UseSums


def gradients(
    networks: Mapping[str, Network],
    loss: LossConfig,
    state: TrainState,
    images_BHWC: Float[Array, "B H W C"],
    *,
    adversarial: bool,
) -> tuple[Sums, metrics.Totals, Float[Array, "B h w P Z"]]:
    """Gradients of the generator and, if `adversarial`, of the discriminator, both at the state's parameters.

    Args:
      networks: "generator"; if adversarial "discriminator"; if there is an LPIPS loss "perceptual".
      loss: weights of the losses.
      state: of the run.
      images_BHWC: in [-1, 1].
      adversarial: whether the discriminator takes part.

    Returns:
      (gradients and counts, metrics, the vectors that were quantized)
    """
    net, frozen = networks["generator"], state.frozen["generator"]

    # --- Generator forward. Its vjp is kept: the losses' cotangents at the image are combined before one backward pass.
    def forward(params: state_lib.Params) -> Any:
        model: Any = net.module(state_lib.join(params, frozen))
        quantized = model.quantize(model.encode(images_BHWC))
        features = model.decode_features(quantized.zq)
        return (model.to_pixels(features), quantized.loss), (quantized, features)

    params = state.trainable["generator"]
    (recon_BHWC, quantizer_loss), pullback, (quantized, features) = jax.vjp(forward, params, has_aux=True)

    def reconstruction_loss(recon: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        parts = {"l1": losses.l1(recon, images_BHWC), "l2": losses.l2(recon, images_BHWC)}
        total = loss.l1 * parts["l1"] + loss.l2 * parts["l2"]
        if loss.lpips:
            perceptual: Any = networks["perceptual"].module(state.frozen["perceptual"])
            parts["lpips"] = perceptual(recon, images_BHWC).mean()
            total = total + loss.lpips * parts["lpips"]
        return total, parts

    (rec_loss, parts), cotangent = jax.value_and_grad(reconstruction_loss, has_aux=True)(recon_BHWC)
    total = rec_loss + quantizer_loss
    values = {
        "reconstruction": metrics.mean(rec_loss),
        "psnr": metrics.mean(_psnr(recon_BHWC, images_BHWC)),
        **{name: metrics.mean(value) for name, value in (parts | quantized.losses).items()},
        "codebook_usage": metrics.used_share(quantized.sums.counts_I),
        "code_entropy_bits": metrics.entropy(quantized.sums.counts_I),
    }

    # --- Adversarial part of the generator's loss.
    critic = _critic(networks, state) if adversarial else None
    generator_loss, discriminator_loss = GAN_LOSSES[loss.gan_kind]
    if critic is not None:
        gan_loss, gan_cotangent = jax.value_and_grad(
            lambda recon: generator_loss(critic(state.trainable["discriminator"], recon))
        )(recon_BHWC)
        weight = jnp.asarray(loss.gan, recon_BHWC.dtype)
        if loss.adaptive:
            weight = weight * losses.adaptive_weight(
                _last_layer_gradient(net, state, features, cotangent),
                _last_layer_gradient(net, state, features, gan_cotangent),
            )
        cotangent = cotangent + weight * gan_cotangent
        total = total + weight * gan_loss
        values |= {"gan_generator": metrics.mean(gan_loss), "gan_weight": metrics.mean(weight)}
    values["loss"] = metrics.mean(total)
    grads = {"generator": pullback((cotangent, jnp.ones_like(quantizer_loss)))[0]}

    # --- The discriminator's loss on the same reconstructions; real and fake go through in separate calls.
    if critic is not None:
        fake_BHWC = jax.lax.stop_gradient(recon_BHWC)
        value, grads["discriminator"] = jax.value_and_grad(
            lambda params: discriminator_loss(critic(params, images_BHWC), critic(params, fake_BHWC))
        )(state.trainable["discriminator"])
        values["gan_discriminator"] = metrics.mean(value)
    return Sums(grads, quantized.sums), values, quantized.vectors


def _psnr(x_BHWC: jax.Array, target_BHWC: jax.Array) -> jax.Array:
    """Per-image PSNR in dB of images in [-1, 1], clipped to that range."""
    mse_B = jnp.mean(jnp.square(jnp.clip(x_BHWC, -1, 1) - target_BHWC), axis=(1, 2, 3))
    return 10 * jnp.log10(4.0 / jnp.maximum(mse_B, 1e-10))


def _critic(networks: Mapping[str, Network], state: TrainState) -> Callable[[state_lib.Params, jax.Array], jax.Array]:
    net, frozen = networks["discriminator"], state.frozen["discriminator"]

    def logits(params: state_lib.Params, images_BHWC: jax.Array) -> jax.Array:
        module: Any = net.module(state_lib.join(params, frozen))
        return module(images_BHWC)

    return logits


def _last_layer_gradient(net: Network, state: TrainState, features: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Gradient of a loss with respect to the last layer's kernel, from its cotangent at the image."""
    params = jax.lax.stop_gradient(state.params("generator"))

    def pixels(kernel: jax.Array) -> jax.Array:
        model: Any = net.module(params)
        model.decoder.conv_out.kernel[...] = kernel
        return model.to_pixels(jax.lax.stop_gradient(features))

    module: Any = net.module(params)
    _, pull = jax.vjp(pixels, module.decoder.conv_out.kernel[...])
    return pull(cotangent)[0]
