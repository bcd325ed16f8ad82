"""Discriminators: PatchGAN (pix2pix, arXiv:1611.07004), a map of real/fake logits, one for each overlapping patch; and
StyleGAN2's, one logit for each image.

Shapes: B batch, H height, W width, C channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.models import layers
from imagegpt_jax.models.conv import Conv, GroupNorm
from imagegpt_jax.models.style_discriminator import LAST_SIDE, StyleDiscriminator

KINDS = ("patch", "style")
NORMS = ("batch", "group", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape and precision of a discriminator; the defaults are those of VQGAN and LlamaGen (70 x 70 pixel patches).

    Attributes:
      kind: "patch" (PatchGAN) or "style" (StyleGAN2's).
      in_channels: channels of the image.
      base_width: channels after the first layer ("ndf").
      num_layers: "patch": layers of stride 2; 3 need images of 24 pixels or more, 2 (34 x 34 patches) suit 32 pixels
        better.
      norm: "patch": "batch", "group" or "none", before the activations of all layers but the first.
      norm_groups: groups if `norm` is "group".
      max_width: "style": channels double with every halving of the image up to so many.
      image_size: "style": side of the images, 4 times a power of two.
      deviation_group: "style": images among which the standard deviation is taken that the last layers see.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    kind: str = "patch"
    in_channels: int = 3
    base_width: int = 64
    num_layers: int = 3
    norm: str = "batch"
    norm_groups: int = 32
    max_width: int = 512
    image_size: int = 0
    deviation_group: int = 4
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown discriminator kind {self.kind!r}.{suggest(self.kind, KINDS)}")
        if self.norm not in NORMS:
            raise UserError(f"unknown discriminator norm {self.norm!r}.{suggest(self.norm, NORMS)}")
        for name in (self.dtype, self.param_dtype):
            layers.as_dtype(name)
        if self.num_layers < 1:
            raise UserError(f"discriminator num_layers={self.num_layers} is too few: give 1 or more.")
        if self.kind == "style" and (self.image_size < 2 * LAST_SIDE or self.image_size & (self.image_size - 1)):
            raise UserError(
                f"a discriminator of kind 'style' halves images of image_size={self.image_size} down to {LAST_SIDE}"
                " pixels: give a power of two, 8 or more."
            )

    @property
    def min_size(self) -> int:
        """The smallest side of an image that leaves one logit of a PatchGAN."""
        return 3 * 2**self.num_layers


class BatchNorm(nnx.Module):
    """Batch normalisation by the statistics of the batch at hand.

    The discriminator only ever judges whole training batches, so there are no running statistics to mutate; under jit
    the mean over a sharded batch is the mean over all devices. Real and fake images go in separate calls.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, dtype: str = "float32", param_dtype: str = "float32"):
        self.scale = nnx.Param(jnp.ones(channels, param_dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype), axes=(None,))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Normalises each channel over batch and positions, in float32 (float64 in float64)."""
        x_BHWC = x_BHWC.astype(layers.accumulation_dtype(x_BHWC.dtype))
        mean_C = jnp.mean(x_BHWC, axis=(0, 1, 2))
        variance_C = jnp.maximum(jnp.mean(jnp.square(x_BHWC), axis=(0, 1, 2)) - jnp.square(mean_C), 0.0)
        scale_C = lax.rsqrt(variance_C + self.eps) * self.scale[...]
        return (x_BHWC * scale_C + (self.bias[...] - mean_C * scale_C)).astype(self.dtype)


class Discriminator(nnx.Module):
    """PatchGAN: 4x4 convolutions, `num_layers` of stride 2, one of stride 1, one to the logits; leaky ReLU of 0.2."""

    def __init__(self, config: DiscriminatorConfig, *, key: jax.Array):
        widths = [config.base_width * min(2**i, 8) for i in range(config.num_layers + 1)]
        ins, outs = [config.in_channels, *widths], [*widths, 1]
        convs, norms = [], []
        for i, k in enumerate(jax.random.split(key, len(outs))):
            inner = 0 < i < len(outs) - 1
            layer = Conv(
                ins[i],
                outs[i],
                4,
                stride=2 if i < config.num_layers else 1,
                padding=(1, 1),
                use_bias=not (inner and config.norm == "batch"),  # the norm's own bias takes its place
                impl="xla",
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                key=k,
            )
            # N(0, 0.02), as in DCGAN and pix2pix: larger kernels let the discriminator win at once.
            layer.kernel[...] = 0.02 * jax.random.normal(k, layer.kernel.shape, config.param_dtype)
            convs.append(layer)
            norms.append(_norm(config, outs[i]) if inner else None)
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.config = config

    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w"]:
        """Images in [-1, 1] -> logits, positive for real, fp32 or wider; raises UserError below `config.min_size`."""
        _, H, W, _ = images_BHWC.shape
        if min(H, W) < self.config.min_size:
            raise UserError(
                f"images of {H} x {W} pixels are too small for a discriminator of {self.config.num_layers} layers:"
                f" use fewer layers (num_layers), or images of at least {self.config.min_size} pixels."
            )
        x = images_BHWC
        last = len(self.convs) - 1
        for i, (layer, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = layer(x)
            x = x if norm is None else norm(x)
            x = x if i == last else nnx.leaky_relu(x, 0.2)
        return x[..., 0].astype(layers.accumulation_dtype(x.dtype))


def _norm(config: DiscriminatorConfig, channels: int) -> nnx.Module | None:
    if config.norm == "batch":
        return BatchNorm(channels, dtype=config.dtype, param_dtype=config.param_dtype)
    if config.norm == "group":
        return GroupNorm(channels, config.norm_groups, eps=1e-5, dtype=config.dtype, param_dtype=config.param_dtype)
    return None


def make(config: DiscriminatorConfig, *, key: jax.Array) -> Discriminator | StyleDiscriminator:
    """The discriminator that a config describes."""
    if config.kind == "patch":
        return Discriminator(config, key=key)
    return StyleDiscriminator(
        config.in_channels,
        config.base_width,
        config.max_width,
        config.image_size,
        group=config.deviation_group,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        key=key,
    )
