"""StyleGAN2's discriminator (arXiv:1912.04958): residual blocks that halve the image, one logit for each image.

Weights start from N(0, 1) and are scaled by 1 / sqrt(fan in) where they are used (arXiv:1710.10196, section 4.1).

Shapes: B batch, H height, W width, C channels in, O channels out, S statistics groups.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from imagegpt_jax.errors import UserError
from imagegpt_jax.models import layers
from imagegpt_jax.parallel import fsdp

# Side of the map that is left when the last block has halved it.
LAST_SIDE = 4
# The low-pass filter of StyleGAN2, before every halving.
FILTER = np.array([1.0, 3.0, 3.0, 1.0]) / 8
NHWC = ("NHWC", "HWIO", "NHWC")


def blur(x_BHWC: Float[Array, "B H W C"], padding: int, stride: int = 1) -> Float[Array, "B H2 W2 C"]:
    """Low-pass filters each channel by [1, 3, 3, 1] x [1, 3, 3, 1], with `padding` zeros on all sides."""
    C = x_BHWC.shape[-1]
    kernel_hw = np.outer(FILTER, FILTER)
    kernel_hw1C = jnp.broadcast_to(jnp.asarray(kernel_hw, x_BHWC.dtype)[:, :, None, None], (4, 4, 1, C))
    pad = ((padding, padding), (padding, padding))
    return lax.conv_general_dilated(
        x_BHWC, kernel_hw1C, (stride, stride), pad, dimension_numbers=NHWC, feature_group_count=C
    )


def batch_deviation(x_BHWC: Float[Array, "B H W C"], group: int) -> Float[Array, "B H W C+1"]:
    """Adds a channel: the standard deviation within groups of `group` neighbours of the batch, averaged over the image
    (arXiv:1710.10196, section 3). Neighbours lie on one device wherever a device holds a group."""
    B, H, W, C = x_BHWC.shape
    group = math.gcd(B, group)
    x_SGHWC = x_BHWC.reshape(-1, group, H, W, C).astype(layers.accumulation_dtype(x_BHWC.dtype))
    deviation_S = jnp.mean(jnp.sqrt(jnp.var(x_SGHWC, axis=1) + 1e-8), axis=(1, 2, 3))
    plane_BHW1 = jnp.broadcast_to(jnp.repeat(deviation_S, group)[:, None, None, None], (B, H, W, 1))
    return jnp.concatenate([x_BHWC, plane_BHW1.astype(x_BHWC.dtype)], axis=-1)


class EqualConv(nnx.Module):
    """Convolution with a kernel scaled by 1 / sqrt(fan in) at use; with `halve`, low-pass filtered and of stride 2."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        halve: bool = False,
        use_bias: bool = True,
        activate: bool = True,
        dtype: str,
        param_dtype: str,
        key: jax.Array,
    ):
        shape = (size, size, in_channels, out_channels)
        self.kernel = nnx.Param(jax.random.normal(key, shape, param_dtype), axes=(None, None, "conv_in", "conv_out"))
        self.bias = nnx.Param(jnp.zeros(out_channels, param_dtype), axes=(None,)) if use_bias else None
        self.size, self.halve, self.activate, self.dtype = size, halve, activate, dtype

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 O"]:
        """Convolves and, where asked, adds a bias and activates: leaky ReLU of 0.2, times sqrt(2) for the variance."""
        return fsdp.apply(EqualConv._convolve, self, x_BHWC.astype(self.dtype))

    def _convolve(self, x_BHWC: Array) -> Array:
        kernel = (self.kernel[...] / math.sqrt(math.prod(self.kernel.shape[:3]))).astype(self.dtype)
        pad, stride = self.size // 2, 1
        if self.halve:
            x_BHWC, pad, stride = blur(x_BHWC, 1 + pad), 0, 2
        y = lax.conv_general_dilated(x_BHWC, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=NHWC)
        y = y if self.bias is None else y + self.bias[...].astype(self.dtype)
        return nnx.leaky_relu(y, 0.2) * math.sqrt(2) if self.activate else y


class HalvingBlock(nnx.Module):
    """Two convolutions, of which the second halves the image, beside a halving 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: str, param_dtype: str, key: jax.Array):
        keys = jax.random.split(key, 3)
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.conv1 = EqualConv(in_channels, in_channels, 3, key=keys[0], **kinds)
        self.conv2 = EqualConv(in_channels, out_channels, 3, halve=True, key=keys[1], **kinds)
        self.skip = EqualConv(
            in_channels, out_channels, 1, halve=True, use_bias=False, activate=False, key=keys[2], **kinds
        )

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 O"]:
        """Applies the block; the sum of both branches keeps the variance."""
        return (self.conv2(self.conv1(x_BHWC)) + self.skip(x_BHWC)) * math.sqrt(0.5)


class StyleDiscriminator(nnx.Module):
    """Image of a fixed size -> one logit."""

    def __init__(
        self,
        in_channels: int,
        base_width: int,
        max_width: int,
        image_size: int,
        *,
        group: int,
        dtype: str,
        param_dtype: str,
        key: jax.Array,
    ):
        blocks = int(math.log2(image_size // LAST_SIDE))
        widths = [min(base_width * 2**i, max_width) for i in range(blocks + 1)]
        keys = jax.random.split(key, blocks + 4)
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.conv_in = EqualConv(in_channels, widths[0], 1, key=keys[0], **kinds)
        self.blocks = nnx.List(
            [HalvingBlock(widths[i], widths[i + 1], key=keys[4 + i], **kinds) for i in range(blocks)]
        )
        self.conv_out = EqualConv(widths[-1] + 1, widths[-1], 3, key=keys[1], **kinds)
        # A product with the whole map, and one with its result.
        self.dense = EqualConv(LAST_SIDE**2 * widths[-1], widths[-1], 1, key=keys[2], **kinds)
        self.logit = EqualConv(widths[-1], 1, 1, activate=False, key=keys[3], **kinds)
        self.group, self.image_size = group, image_size

    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B 1 1"]:
        """Images in [-1, 1] -> logits, positive for real, fp32 or wider; raises UserError for other sizes."""
        if images_BHWC.shape[1:3] != (self.image_size,) * 2:
            raise UserError(
                f"images of {images_BHWC.shape[1]} x {images_BHWC.shape[2]} pixels do not fit the discriminator: set"
                f" discriminator.image_size, now {self.image_size}, to the side of square images."
            )
        x = self.conv_in(images_BHWC)
        for block in self.blocks:
            x = block(x)
        x = self.conv_out(batch_deviation(x, self.group))
        x = self.logit(self.dense(x.reshape(x.shape[0], 1, 1, -1)))
        return x[..., 0].astype(layers.accumulation_dtype(x.dtype))
