"""Convolution, group normalisation and the blocks that the image tokenizer is made of.

Shapes: B batch, H height, W width, C channels in, O channels out, G groups, N = M = H * W, a heads, c channels of a
head, h w grid of codes, Z code dimension.
Kernels are stored [height, width, in, out].
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.models import layers, winograd
from imagegpt_jax.parallel import fsdp, sharding

CONV_IMPLS = ("auto", "xla", "winograd")


def check_conv_impl(impl: str) -> None:
    """Raises UserError unless `impl` is one of CONV_IMPLS."""
    if impl not in CONV_IMPLS:
        raise UserError(f"unknown conv_impl {impl!r}.{suggest(impl, CONV_IMPLS)} All: {', '.join(CONV_IMPLS)}.")


# On CPU, Winograd pays from this many channels on; the first convolution of an image has too few.
_WINOGRAD_MIN_CHANNELS = 32


class Conv(nnx.Module):
    """2-D convolution over [B, H, W, C] with explicit padding; 1x1 convolutions are matrix products.

    The kernel starts uniform in +-1/sqrt(fan in), as the published tokenizers (PyTorch's default) do; the bias at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        use_bias: bool = True,
        impl: str = "auto",
        dtype: str = "float32",
        param_dtype: str = "float32",
        key: jax.Array,
    ):
        """Makes the layer, by default with `kernel_size // 2` zeros around the image.

        `impl` is "xla"; "winograd", for 3x3, stride 1, padding 1 and sides that are multiples of 4 (elsewhere "xla"
        stands in); or "auto": "winograd" for float32 and wide layers on CPU, where it trains 1.5 to 1.8 times as fast,
        else "xla".
        """
        check_conv_impl(impl)
        init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(init(key, shape, param_dtype), axes=(None, None, "conv_in", "conv_out"))
        self.bias = nnx.Param(jnp.zeros(out_channels, param_dtype), axes=(None,)) if use_bias else None
        self.kernel_size, self.stride, self.impl, self.dtype = kernel_size, stride, impl, dtype
        self.padding = (kernel_size // 2, kernel_size // 2) if padding is None else padding

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 O"]:
        """Convolves."""
        return fsdp.apply(Conv._convolve, self, x_BHWC.astype(self.dtype))

    def _convolve(self, x_BHWC: Array) -> Array:
        # Gathered once, in the compute dtype: otherwise the compiler cuts some convolutions over channels and sends
        # activations around instead.
        w_kkCO = sharding.constrain(self.kernel[...].astype(self.dtype), (None,) * 4)
        if self.kernel_size == 1 and self.stride == 1:
            y_BHWO = x_BHWC @ w_kkCO[0, 0]
        elif self._use_winograd(x_BHWC):
            y_BHWO = winograd.conv3x3(x_BHWC, w_kkCO)
        else:
            y_BHWO = lax.conv_general_dilated(
                x_BHWC,
                w_kkCO,
                (self.stride, self.stride),
                (self.padding, self.padding),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return y_BHWO if self.bias is None else y_BHWO + self.bias[...].astype(self.dtype)

    def _use_winograd(self, x_BHWC: Array) -> bool:
        fits = self.kernel_size == 3 and self.stride == 1 and self.padding == (1, 1) and winograd.applies(x_BHWC.shape)
        if self.impl != "auto" or not fits:
            return fits and self.impl == "winograd"
        wide = min(self.kernel.shape[2:]) >= _WINOGRAD_MIN_CHANNELS
        return wide and self.dtype == "float32" and sharding.platform() == "cpu"


class GroupNorm(nnx.Module):
    """Group normalisation (Wu and He 2018, arXiv:1803.08494) over [B, H, W, C] with a scale and bias per channel.

    Mean and mean of squares are taken in float32 (`layers.accumulation_dtype`) in one pass over the input, per channel
    first and then per group, so that the image is never reshaped and the result is one fused multiply-add.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 32,
        *,
        eps: float = 1e-6,
        dtype: str = "float32",
        param_dtype: str = "float32",
    ):
        if channels % groups:
            raise UserError(
                f"norm_groups={groups} does not divide {channels} channels: choose a divisor of every width."
            )
        self.scale = nnx.Param(jnp.ones(channels, param_dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype), axes=(None,))
        self.groups, self.eps, self.dtype = groups, eps, dtype

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Normalises each group of channels of each image."""
        B, _, _, C = x_BHWC.shape
        x_BHWC = x_BHWC.astype(layers.accumulation_dtype(x_BHWC.dtype))
        mean_BC, square_BC = jnp.mean(x_BHWC, axis=(1, 2)), jnp.mean(jnp.square(x_BHWC), axis=(1, 2))
        mean_BG1 = jnp.mean(mean_BC.reshape(B, self.groups, -1), axis=-1, keepdims=True)
        square_BG1 = jnp.mean(square_BC.reshape(B, self.groups, -1), axis=-1, keepdims=True)
        variance_BG1 = jnp.maximum(square_BG1 - jnp.square(mean_BG1), 0.0)
        rate_BG1 = lax.rsqrt(variance_BG1 + self.eps)
        per_channel = (B, self.groups, C // self.groups)
        scale_BC = jnp.broadcast_to(rate_BG1, per_channel).reshape(B, C) * self.scale[...].astype(x_BHWC.dtype)
        shift_BC = self.bias[...] - jnp.broadcast_to(mean_BG1, per_channel).reshape(B, C) * scale_BC
        return (x_BHWC * scale_BC[:, None, None] + shift_BC[:, None, None]).astype(self.dtype)


class SpatialNorm(nnx.Module):
    """Group normalisation scaled and shifted, at every place, by maps of the codes there (MoVQ, arXiv:2209.09002)."""

    def __init__(
        self, channels: int, *, code_dim: int, groups: int, dtype: str, param_dtype: str, key: jax.Array
    ) -> None:
        keys = jax.random.split(key)
        conv = functools.partial(Conv, code_dim, channels, 1, dtype=dtype, param_dtype=param_dtype)
        self.norm = GroupNorm(channels, groups, dtype=dtype, param_dtype=param_dtype)
        self.scale, self.shift = (conv(key=k) for k in keys)

    def __call__(self, x_BHWC: Float[Array, "B H W C"], z_BhwZ: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        """Normalises; H and W are multiples of h and w."""
        # The maps are 1x1 and the codes only repeat: mapped first, it is the same for a fraction of the work.
        H, W = x_BHWC.shape[1:3]
        scale, shift = (_repeat(layer(z_BhwZ), (H, W)) for layer in (self.scale, self.shift))
        return self.norm(x_BHWC) * scale + shift


def _repeat(x_BhwC: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B H W C"]:
    """Nearest-neighbour enlargement to a multiple of the size."""
    B, h, w, C = x_BhwC.shape
    rows, columns = size[0] // h, size[1] // w
    x = jnp.broadcast_to(x_BhwC[:, :, None, :, None], (B, h, rows, w, columns, C))
    return x.reshape(B, h * rows, w * columns, C)


def make_norm(
    channels: int, *, code_dim: int, groups: int, dtype: str, param_dtype: str, key: jax.Array
) -> GroupNorm | SpatialNorm:
    """A group norm; a spatial norm where it is told the dimension of the codes."""
    kinds = {"groups": groups, "dtype": dtype, "param_dtype": param_dtype}
    return SpatialNorm(channels, code_dim=code_dim, key=key, **kinds) if code_dim else GroupNorm(channels, **kinds)


def normalize(norm: GroupNorm | SpatialNorm, x_BHWC: Array, z_BhwZ: Array | None) -> Float[Array, "B H W C"]:
    """Applies a norm of either kind."""
    if isinstance(norm, GroupNorm):
        return norm(x_BHWC)
    assert z_BhwZ is not None
    return norm(x_BHWC, z_BhwZ)


class ResBlock(nnx.Module):
    """norm, swish, conv, norm, swish, conv, plus the input (through a 1x1 convolution where the width changes).

    With `plain`, MaskGIT's block (arXiv:2202.04200): no biases, and where the width changes the 1x1 convolution reads
    the block's own output instead of its input, so that the input is not added at all.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        code_dim: int = 0,
        plain: bool = False,
        groups: int,
        impl: str,
        dtype: str,
        param_dtype: str,
        key: jax.Array,
    ):
        keys = jax.random.split(key, 5 if code_dim else 3)
        conv = functools.partial(Conv, impl=impl, dtype=dtype, param_dtype=param_dtype, use_bias=not plain)
        norm = functools.partial(make_norm, code_dim=code_dim, groups=groups, dtype=dtype, param_dtype=param_dtype)
        self.norm1 = norm(in_channels, key=keys[-1])
        self.conv1 = conv(in_channels, out_channels, key=keys[0])
        self.norm2 = norm(out_channels, key=keys[-2])
        self.conv2 = conv(out_channels, out_channels, key=keys[1])
        shortcut_in = out_channels if plain else in_channels
        self.nin_shortcut = conv(shortcut_in, out_channels, 1, key=keys[2]) if in_channels != out_channels else None
        self.plain = plain

    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], z_BhwZ: Float[Array, "B h w Z"] | None = None
    ) -> Float[Array, "B H W O"]:
        """Applies the block; z are the codes, for spatial norms."""
        h = self.conv1(nnx.swish(normalize(self.norm1, x_BHWC, z_BhwZ)))
        h = self.conv2(nnx.swish(normalize(self.norm2, h, z_BhwZ)))
        if self.nin_shortcut is None:
            return x_BHWC + h
        return self.nin_shortcut(h if self.plain else x_BHWC) + h


class AttnBlock(nnx.Module):
    """Self-attention over all positions of the image, with 1x1 convolutions, plus the input."""

    def __init__(
        self,
        channels: int,
        *,
        code_dim: int = 0,
        heads: int = 1,
        groups: int,
        dtype: str,
        param_dtype: str,
        key: jax.Array,
    ):
        keys = jax.random.split(key, 4)
        conv = functools.partial(Conv, channels, channels, 1, dtype=dtype, param_dtype=param_dtype)
        norm_key = jax.random.fold_in(key, 0)
        self.norm = make_norm(
            channels, code_dim=code_dim, groups=groups, dtype=dtype, param_dtype=param_dtype, key=norm_key
        )
        self.q, self.k, self.v, self.proj_out = (conv(key=k) for k in keys)
        self.heads = heads

    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], z_BhwZ: Float[Array, "B h w Z"] | None = None
    ) -> Float[Array, "B H W C"]:
        """Applies the block; z are the codes, for spatial norms."""
        B, H, W, C = x_BHWC.shape
        heads = self.heads
        h = normalize(self.norm, x_BHWC, z_BhwZ)
        q_BNac, k_BMac, v_BMac = (layer(h).reshape(B, H * W, heads, -1) for layer in (self.q, self.k, self.v))
        # Written out, because the softmax of jax.nn.dot_product_attention is float32 in float64 too.
        scores_BaNM = jnp.einsum(
            "bnac,bmac->banm", q_BNac, k_BMac, preferred_element_type=layers.accumulation_dtype(h.dtype)
        )
        weights_BaNM = jax.nn.softmax(scores_BaNM * (C // heads) ** -0.5, axis=-1).astype(h.dtype)
        h = jnp.einsum("banm,bmac->bnac", weights_BaNM, v_BMac)
        return x_BHWC + self.proj_out(h.reshape(B, H, W, C))


class Downsample(nnx.Module):
    """Halves height and width by a strided 3x3 convolution, padded at the right and the bottom only."""

    def __init__(self, channels: int, *, impl: str, dtype: str, param_dtype: str, key: jax.Array):
        self.conv = Conv(
            channels, channels, stride=2, padding=(0, 1), impl=impl, dtype=dtype, param_dtype=param_dtype, key=key
        )

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        """Halves the resolution."""
        return self.conv(x_BHWC)


class MeanPool(nnx.Module):
    """Halves height and width by the mean of 2 x 2 places; without parameters."""

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        """Halves the resolution."""
        B, H, W, C = x_BHWC.shape
        return jnp.mean(x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C), axis=(2, 4))


class Upsample(nnx.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int, *, impl: str, dtype: str, param_dtype: str, key: jax.Array):
        self.conv = Conv(channels, channels, impl=impl, dtype=dtype, param_dtype=param_dtype, key=key)

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        """Doubles the resolution."""
        H, W = x_BHWC.shape[1:3]
        return self.conv(_repeat(x_BHWC, (2 * H, 2 * W)))


def space_to_depth(x_BHWC: Float[Array, "B H W C"], patch: int) -> Float[Array, "B H2 W2 C2"]:
    """Moves each patch x patch square of pixels into the channels, ordered (row, column, channel)."""
    B, H, W, C = x_BHWC.shape
    if H % patch or W % patch:
        raise UserError(f"images of {H} x {W} pixels do not divide into patches of {patch}: resize to a multiple.")
    x = x_BHWC.reshape(B, H // patch, patch, W // patch, patch, C).swapaxes(2, 3)
    return x.reshape(B, H // patch, W // patch, patch * patch * C)


def depth_to_space(x_BHWC: Float[Array, "B H W C"], patch: int) -> Float[Array, "B H2 W2 C2"]:
    """The inverse of `space_to_depth`."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H, W, patch, patch, C // patch**2).swapaxes(2, 3)
    return x.reshape(B, H * patch, W * patch, C // patch**2)
