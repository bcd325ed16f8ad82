"""The part of a video tokenizer that works along time, as far as single images need it (Emu3, arXiv:2409.18869).

A picture is a film of equal frames on the way in, and the first frame of a film on the way out. All convolutions look
back in time alone, so the first frame depends on nothing else.

Shapes: B batch, T frames, h w places, C channels in, O channels out. Kernels are stored [time, height, width, in, out].
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from imagegpt_jax.parallel import fsdp

# Frames of zeros before the first: what every convolution along time is padded by, whatever its kernel.
_PADDING = 2
# The default of BatchNorm in the library that the weights come from.
_BATCH_NORM_EPS = 1e-5


class Conv3d(nnx.Module):
    """Convolution over time, height and width that sees two earlier frames; places are padded to keep their number."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        *,
        stride: int = 1,
        dtype: str,
        param_dtype: str,
        key: jax.Array,
    ):
        """Makes the layer; `stride` is that of time."""
        init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1, 2, 3), out_axis=4)
        shape = (*kernel, in_channels, out_channels)
        self.kernel = nnx.Param(init(key, shape, param_dtype), axes=(None, None, None, "conv_in", "conv_out"))
        self.bias = nnx.Param(jnp.zeros(out_channels, param_dtype), axes=(None,))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x_BThwC: Float[Array, "B T h w C"]) -> Float[Array, "B T2 h w O"]:
        """Convolves."""
        return fsdp.apply(Conv3d._convolve, self, x_BThwC.astype(self.dtype))

    def _convolve(self, x_BThwC: Array) -> Array:
        kernel = self.kernel[...].astype(self.dtype)
        sides = [((n - 1) // 2 + (n - 1) % 2, (n - 1) // 2) for n in kernel.shape[1:3]]
        y = lax.conv_general_dilated(
            x_BThwC, kernel, (self.stride, 1, 1), ((_PADDING, 0), *sides), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        return y + self.bias[...].astype(self.dtype)


class FixedBatchNorm(nnx.Module):
    """Batch normalisation by the statistics of a finished training."""

    def __init__(self, channels: int, *, param_dtype: str):
        self.scale = nnx.Param(jnp.ones(channels, param_dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype), axes=(None,))
        self.mean = nnx.Param(jnp.zeros(channels, param_dtype), axes=(None,))
        self.variance = nnx.Param(jnp.ones(channels, param_dtype), axes=(None,))

    def __call__(self, x: Float[Array, "*_ C"]) -> Float[Array, "*_ C"]:
        """Normalises each channel."""
        mean, variance = (lax.stop_gradient(v[...].astype(x.dtype)) for v in (self.mean, self.variance))
        rate = lax.rsqrt(variance + _BATCH_NORM_EPS) * self.scale[...].astype(x.dtype)
        return (x - mean) * rate + self.bias[...].astype(x.dtype)


class TemporalResBlock(nnx.Module):
    """norm, swish, conv, norm, swish, conv, plus the input, over time and space."""

    def __init__(self, channels: int, *, dtype: str, param_dtype: str, key: jax.Array):
        keys = jax.random.split(key)
        self.norm1 = FixedBatchNorm(channels, param_dtype=param_dtype)
        self.conv1 = Conv3d(channels, channels, (3, 3, 3), dtype=dtype, param_dtype=param_dtype, key=keys[0])
        self.norm2 = FixedBatchNorm(channels, param_dtype=param_dtype)
        self.conv2 = Conv3d(channels, channels, (3, 3, 3), dtype=dtype, param_dtype=param_dtype, key=keys[1])

    def __call__(self, x_BThwC: Float[Array, "B T h w C"]) -> Float[Array, "B T h w C"]:
        """Applies the block."""
        h = self.conv1(nnx.swish(self.norm1(x_BThwC)))
        return x_BThwC + self.conv2(nnx.swish(self.norm2(h)))


class Frames(nnx.Module):
    """Encoder: a film of equal frames -> one frame. Decoder: one frame -> the first of the film."""

    def __init__(
        self, channels: int, frames: int, blocks: int, *, encoder: bool, dtype: str, param_dtype: str, key: jax.Array
    ):
        """Makes the layers of a film of `frames`, a power of two; time is halved (`encoder`), or doubled."""
        halvings = frames.bit_length() - 1
        keys = iter(jax.random.split(key, halvings + blocks + 1))
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        kernel, stride = ((4, 3, 3), 2) if encoder else ((3, 3, 3), 1)
        make = functools.partial(Conv3d, channels, channels, kernel, stride=stride, **kinds)
        self.time_conv = nnx.List([make(key=next(keys)) for _ in range(halvings)])
        self.time_res_stack = nnx.List([TemporalResBlock(channels, key=next(keys), **kinds) for _ in range(blocks)])
        self.frames, self.encoder = frames, encoder

    def __call__(self, x_BhwC: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Features of a picture, through time and back to one frame."""
        frames = self.frames if self.encoder else 1
        x = jnp.broadcast_to(x_BhwC[:, None], (len(x_BhwC), frames, *x_BhwC.shape[1:]))
        if self.encoder:
            for conv in self.time_conv:
                x = nnx.swish(conv(x))
        for block in self.time_res_stack:
            x = block(x)
        if not self.encoder:  # doubling time repeats frames, which leaves the first as it is
            for conv in self.time_conv:
                x = nnx.swish(conv(x))
        return x[:, 0]
