"""Losses of the image tokenizer and their gradients on one batch: of the autoencoder, and of the discriminator.

Shapes: B batch, H W C image, h w code grid, Z code dimension, P codes of a vector.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagegpt_jax import train_state
from imagegpt_jax.errors import UserError, at_least, check_ranges
from imagegpt_jax.losses import basic
from imagegpt_jax.models.quantizers import UseSums
from imagegpt_jax.plugins import plug_in, resolve
from imagegpt_jax.train_state import Network, TrainState
from imagegpt_jax.training import train_metrics

RANGES = {
    **dict.fromkeys(("l1", "l2", "logit_laplace", "lpips", "gan"), at_least(0, "0 leaves it out")),
    "lecam_decay": at_least(0, below=1),
}
# Losses that metrics show by these names.
RESERVED = (*basic.PIXEL_LOSSES, "logit_laplace", "lpips", "commitment", "codebook", "index", "entropy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the tokenizer's losses.

    Attributes:
      l1: weight of the mean absolute error.
      l2: weight of the mean squared error.
      logit_laplace: weight of the pixels' negative log likelihood (arXiv:2102.12092), with `model.logit_laplace`.
      lpips: weight of the perceptual distance; 0 = off.
      lpips_weights: safetensors file made by `tools/convert_lpips.py`, needed if `lpips` > 0.
      gan: weight of the adversarial loss on the generator.
      gan_kind: "hinge", "non_saturating", or "non_saturating_hinge" (the first for the generator, the second for the
        discriminator); or "module:name" of a `losses.basic.GanLoss` of your own.
      gan_start: step from which the discriminator takes part; negative = never.
      adaptive: scale the adversarial loss by the ratio of gradient norms at the last layer (arXiv:2012.09841, eq. 7).
      discriminator_first: in each step the discriminator is updated before it judges for the generator; else both
        gradients are taken at the same parameters.
      lecam: weight of the LeCam regulariser of the discriminator (arXiv:2104.03310); 0 = off.
      lecam_decay: decay of the moving averages of the logits that LeCam pulls to.
      r1: weight of the R1 gradient penalty of the discriminator (arXiv:1801.04406), gamma; 0 = off.
      others: losses of your own, as "WEIGHT*module:name + ...": functions (reconstructions, images) -> mean loss.
    """

    l1: float
    l2: float
    lpips: float
    lpips_weights: str
    gan: float
    gan_kind: str
    gan_start: int
    adaptive: bool
    discriminator_first: bool = False
    lecam: float = 0.0
    lecam_decay: float = 0.999
    r1: float = 0.0
    logit_laplace: float = 0.0
    others: str = ""

    def __post_init__(self):
        check_ranges(self, RANGES, "--config.loss.")
        if not isinstance(self.gan_loss, basic.GanLoss):
            raise UserError(f"loss.gan_kind={self.gan_kind} is no losses.basic.GanLoss: make it one.")
        if min((weight for weight, _ in self.other_losses.values()), default=0) < 0:
            raise UserError(f"loss.others={self.others!r} has a weight below 0: give weights of at least 0.")

    @property
    def gan_loss(self) -> basic.GanLoss:
        """What `gan_kind` names."""
        return resolve(self.gan_kind, "gan_kind", basic.GAN_LOSSES)

    @property
    def other_losses(self) -> dict[str, tuple[float, Callable[..., Float[Array, ""]]]]:
        """Name in the metrics -> (weight, function), of `others`."""
        losses = {}
        for term in filter(None, (part.strip() for part in self.others.split(" + "))):
            weight, _, path = term.partition("*")
            name = path.rpartition(":")[2]
            if name in losses or name in RESERVED:
                raise UserError(f"loss.others has {path}, and another loss is called {name}: rename the function.")
            try:
                losses[name] = (float(weight), plug_in(path, "loss"))
            except ValueError:
                raise UserError(
                    f"loss.others={self.others!r} must be WEIGHT*module:name + ..., not {term!r}."
                ) from None
        return losses


class Logits(NamedTuple):
    """Mean logits of the discriminator for real and for fake images."""

    real: Float[Array, ""]
    fake: Float[Array, ""]


class Sums(NamedTuple):
    """What adds up over the parts of a batch.

    Attributes:
      gradients: network -> gradient of the mean of its loss.
      use: of the codes; None where the generator has no gradient.
      logits: None where the discriminator has no gradient.
    """

    gradients: dict[str, train_state.Params]
    use: UseSums | None
    logits: Logits | None


def init_stats(loss: LossConfig) -> dict[str, Logits]:
    """What the losses carry from step to step: with LeCam the moving averages of the logits."""
    return {"logits": Logits(jnp.zeros(()), jnp.zeros(()))} if loss.gan_start >= 0 and loss.lecam else {}


def update_stats(loss: LossConfig, stats: Mapping[str, Any], logits: Logits | None) -> dict[str, Any]:
    """`init_stats`'s part of the statistics after a batch with these mean logits."""
    if logits is None or "logits" not in stats:
        return {name: stats[name] for name in ("logits",) if name in stats}
    decay = loss.lecam_decay
    return {
        "logits": jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new.astype(old.dtype), stats["logits"], logits
        )
    }


def gradients(
    networks: Mapping[str, Network],
    loss: LossConfig,
    state: TrainState,
    images_BHWC: Float[Array, "B H W C"],
    *,
    adversarial: bool,
    judge: bool,
) -> tuple[Sums, train_metrics.Totals, Float[Array, "B h w P Z"]]:
    """Gradients of the generator and, if asked for, of the discriminator, both at the state's parameters.

    Args:
      networks: "generator"; if adversarial "discriminator"; if there is an LPIPS loss "perceptual".
      loss, state: of the run.
      images_BHWC: in [-1, 1].
      adversarial: whether the discriminator takes part.
      judge: whether its own gradient is taken too, on the same reconstructions.

    Returns:
      (gradients and counts, metrics, the vectors that were quantized)
    """
    net, frozen = networks["generator"], state.frozen["generator"]

    # --- Generator forward. Its vjp is kept: the losses' cotangents at the image are combined before one backward pass.
    def forward(params: train_state.Params) -> Any:
        model: Any = net.module(train_state.join(params, frozen))
        quantized = model.quantize(model.encode(images_BHWC))
        features = model.decode_features(quantized.zq)
        return (model.output(features), quantized.loss), (quantized, features)

    params = state.trainable["generator"]
    (output_BHWC, quantizer_loss), pullback, (quantized, features) = jax.vjp(forward, params, has_aux=True)

    def pixels(output: jax.Array) -> jax.Array:
        model: Any = net.module(state.params("generator"))
        return model.pixels(output)

    recon_BHWC = pixels(output_BHWC)

    def reconstruction_loss(output: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        recon = pixels(output)
        parts = {name: pixel_loss(recon, images_BHWC) for name, pixel_loss in basic.PIXEL_LOSSES.items()}
        total = loss.l1 * parts["l1"] + loss.l2 * parts["l2"]
        if loss.logit_laplace:
            mean, log_scale = jnp.split(output, 2, axis=-1)
            parts["logit_laplace"] = basic.logit_laplace(mean, log_scale, images_BHWC)
            total = total + loss.logit_laplace * parts["logit_laplace"]
        if loss.lpips:
            perceptual: Any = networks["perceptual"].module(state.frozen["perceptual"])
            parts["lpips"] = perceptual(recon, images_BHWC).mean()
            total = total + loss.lpips * parts["lpips"]
        for name, (weight, function) in loss.other_losses.items():
            parts[name] = function(recon, images_BHWC)
            total = total + weight * parts[name]
        return total, parts

    (rec_loss, parts), cotangent = jax.value_and_grad(reconstruction_loss, has_aux=True)(output_BHWC)
    total = rec_loss + quantizer_loss
    values = {
        "reconstruction": train_metrics.mean(rec_loss),
        "psnr": train_metrics.mean(_psnr(recon_BHWC, images_BHWC)),
        **{name: train_metrics.mean(value) for name, value in (parts | quantized.losses).items()},
        "codebook_usage": train_metrics.used_share(quantized.sums.counts_I),
        "code_entropy_bits": train_metrics.entropy(quantized.sums.counts_I),
    }

    # --- Adversarial part of the generator's loss.
    if adversarial:
        critic = _critic(networks, state)
        gan_loss, gan_cotangent = jax.value_and_grad(
            lambda output: loss.gan_loss.generator(critic(state.trainable["discriminator"], pixels(output)))
        )(output_BHWC)
        weight = jnp.asarray(loss.gan, recon_BHWC.dtype)
        if loss.adaptive:
            weight = weight * basic.adaptive_weight(
                _last_layer_gradient(net, state, features, cotangent),
                _last_layer_gradient(net, state, features, gan_cotangent),
            )
        cotangent = cotangent + weight * gan_cotangent
        total = total + weight * gan_loss
        values |= {"gan_generator": train_metrics.mean(gan_loss), "gan_weight": train_metrics.mean(weight)}
    values["loss"] = train_metrics.mean(total)
    grads = {"generator": pullback((cotangent, jnp.ones_like(quantizer_loss)))[0]}

    logits = None
    if adversarial and judge:
        grads["discriminator"], logits, judged = _judge(networks, loss, state, images_BHWC, recon_BHWC)
        values |= judged
    return Sums(grads, quantized.sums, logits), values, quantized.vectors


def discriminator_gradients(
    networks: Mapping[str, Network], loss: LossConfig, state: TrainState, images_BHWC: Float[Array, "B H W C"]
) -> tuple[Sums, train_metrics.Totals, tuple[()]]:
    """Gradient of the discriminator alone, for `discriminator_first`; arguments and result as of `gradients`."""
    model: Any = networks["generator"].module(state.params("generator"))
    recon_BHWC = model.to_pixels(model.decode_features(model.quantize(model.encode(images_BHWC)).zq))
    grads, logits, values = _judge(networks, loss, state, images_BHWC, recon_BHWC)
    return Sums({"discriminator": grads}, None, logits), values, ()


def _judge(
    networks: Mapping[str, Network],
    loss: LossConfig,
    state: TrainState,
    images_BHWC: Float[Array, "B H W C"],
    recon_BHWC: Float[Array, "B H W C"],
) -> tuple[train_state.Params, Logits, train_metrics.Totals]:
    """(gradient of the discriminator, its mean logits, metrics); real and fake go through in separate calls."""
    critic, fake_BHWC = _critic(networks, state), jax.lax.stop_gradient(recon_BHWC)

    def judge(params: train_state.Params) -> tuple[jax.Array, tuple[Logits, train_metrics.Totals]]:
        real, fake = critic(params, images_BHWC), critic(params, fake_BHWC)
        total = loss.gan_loss.discriminator(real, fake)
        values: train_metrics.Totals = {"gan_discriminator": train_metrics.mean(total)}
        if loss.lecam:
            averages = state.stats["logits"]
            lecam = basic.lecam(real, fake, averages.real, averages.fake)
            total, values["lecam"] = total + loss.lecam * lecam, train_metrics.mean(lecam)
        if loss.r1:
            r1 = basic.r1(jax.grad(lambda images: critic(params, images).sum())(images_BHWC))
            total, values["r1"] = total + loss.r1 * r1, train_metrics.mean(r1)
        return total, (Logits(real.mean(), fake.mean()), values)

    grads, (logits, values) = jax.grad(judge, has_aux=True)(state.trainable["discriminator"])
    return grads, logits, values


def _psnr(x_BHWC: jax.Array, target_BHWC: jax.Array) -> jax.Array:
    """Per-image PSNR in dB of images in [-1, 1], clipped to that range."""
    mse_B = jnp.mean(jnp.square(jnp.clip(x_BHWC, -1, 1) - target_BHWC), axis=(1, 2, 3))
    return 10 * jnp.log10(4.0 / jnp.maximum(mse_B, 1e-10))


def _critic(networks: Mapping[str, Network], state: TrainState) -> Callable[[train_state.Params, jax.Array], jax.Array]:
    net, frozen = networks["discriminator"], state.frozen["discriminator"]

    def logits(params: train_state.Params, images_BHWC: jax.Array) -> jax.Array:
        module: Any = net.module(train_state.join(params, frozen))
        return module(images_BHWC)

    return logits


def _last_layer_gradient(net: Network, state: TrainState, features: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Gradient of a loss with respect to the last layer's kernel, from its cotangent at that layer's output."""
    params = jax.lax.stop_gradient(state.params("generator"))

    def output(kernel: jax.Array) -> jax.Array:
        model: Any = net.module(params)
        model.decoder.conv_out.kernel[...] = kernel
        return model.output(jax.lax.stop_gradient(features))

    module: Any = net.module(params)
    _, pull = jax.vjp(output, module.decoder.conv_out.kernel[...])
    return pull(cotangent)[0]
