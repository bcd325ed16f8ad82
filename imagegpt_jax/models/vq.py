"""The image tokenizer: convolutional encoder and decoder around a vector quantizer (VQGAN, arXiv:2012.09841).

At `VQConfig()` it is LlamaGen's VQ-16 (arXiv:2406.06525): 71.9 M parameters, module names as in its checkpoints.
Shapes: B batch, H W pixels, h w grid of codes, C channels, Z code dimension, K codes. Images are float in [-1, 1].
"""

import dataclasses
import functools
from typing import TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from imagegpt_jax import sharding
from imagegpt_jax.cli import UserError
from imagegpt_jax.models import conv, layers
from imagegpt_jax.models.quantizers import Quantized, Quantizer, QuantizerConfig

Block = TypeVar("Block", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Shape and precision of a VQModel; the defaults are LlamaGen's VQ-16.

    Attributes:
      in_channels: channels of the image.
      stem_patch: space-to-depth patch before the first and after the last convolution; 1 is none.
      base_width: channels of the first level.
      width_mults: width of each level in units of `base_width`; each level but the last halves the resolution.
      encoder_blocks: residual blocks in each level of the encoder.
      decoder_blocks: residual blocks in each level of the decoder.
      attention_levels: indices of `width_mults` whose residual blocks are each followed by attention.
      mid_attention: whether the middle of encoder and decoder has attention between its two residual blocks.
      z_channels: channels of the encoder's output, before the projection to `quantizer.code_dim`.
      norm_groups: groups of every group normalisation.
      conv_impl: "auto", "xla" or "winograd"; see `conv.Conv`.
      remat: whether to recompute each block in the backward pass instead of keeping its activations.
      dtype: of the computation; norms' statistics and the quantizer stay in float32 (float64 if this is float64).
      param_dtype: of the parameters.
      quantizer: the vector quantizer.
    """

    in_channels: int = 3
    stem_patch: int = 1
    base_width: int = 128
    width_mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    attention_levels: tuple[int, ...] = (4,)
    mid_attention: bool = True
    z_channels: int = 256
    norm_groups: int = 32
    conv_impl: str = "auto"
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    quantizer: QuantizerConfig = dataclasses.field(default_factory=QuantizerConfig)

    def __post_init__(self):
        conv.check_conv_impl(self.conv_impl)
        for name in (self.dtype, self.param_dtype):
            layers.as_dtype(name)
        levels = len(self.width_mults)
        outside = [i for i in self.attention_levels if not 0 <= i < levels]
        if not levels or outside:
            raise UserError(f"attention_levels={outside} do not exist: width_mults has levels 0 to {levels - 1}.")
        if self.stem_patch < 1:
            raise UserError(f"stem_patch={self.stem_patch} is not possible: give 1 (no patches) or more.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from high to low resolution."""
        return tuple(self.base_width * m for m in self.width_mults)

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return self.stem_patch * 2 ** (len(self.width_mults) - 1)


def _layers(config: VQConfig):
    """Constructors of the layers, with what is the same for all of them filled in."""
    precision = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    groups = {"groups": config.norm_groups}
    impl = {"impl": config.conv_impl}
    return (
        functools.partial(conv.Conv, **impl, **precision),
        functools.partial(conv.ResBlock, **groups, **impl, **precision),
        functools.partial(conv.AttnBlock, **groups, **precision),
        functools.partial(conv.GroupNorm, **groups, **precision),
    )


class Level(nnx.Module):
    """Residual blocks at one resolution, each followed by attention where asked; `resample` changes the resolution."""

    def __init__(
        self, config: VQConfig, index: int, in_width: int, blocks: int, resample: str | None, *, key: jax.Array
    ):
        _, res, attn, _ = _layers(config)
        width = config.widths[index]
        keys = iter(jax.random.split(key, 2 * blocks + 1))
        self.res = nnx.List([res(in_width if i == 0 else width, width, key=next(keys)) for i in range(blocks)])
        self.attn = nnx.List([attn(width, key=next(keys)) for _ in range(blocks * (index in config.attention_levels))])
        resampler = {"down": conv.Downsample, "up": conv.Upsample, None: None}[resample]
        precision = {"impl": config.conv_impl, "dtype": config.dtype, "param_dtype": config.param_dtype}
        self.downsample = resampler(width, key=next(keys), **precision) if resampler is conv.Downsample else None
        self.upsample = resampler(width, key=next(keys), **precision) if resampler is conv.Upsample else None
        self.remat = config.remat

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C2"]:
        """Applies the level."""
        for i, block in enumerate(self.res):
            x_BHWC = _apply(block, x_BHWC, self.remat)
            if len(self.attn):
                x_BHWC = _apply(self.attn[i], x_BHWC, self.remat)
        for resample in (self.downsample, self.upsample):
            x_BHWC = x_BHWC if resample is None else resample(x_BHWC)
        return x_BHWC


def _apply(block: nnx.Module, x_BHWC: Array, remat: bool) -> Array:
    def call(block, x):
        return block(x)

    x_BHWC = (jax.checkpoint(call) if remat else call)(block, x_BHWC)
    return sharding.constrain(x_BHWC, ("batch", None, None, None))


def _mid(config: VQConfig, *, key: jax.Array) -> nnx.List:
    _, res, attn, _ = _layers(config)
    width = config.widths[-1]
    keys = jax.random.split(key, 3)
    middle = [attn(width, key=keys[1])] if config.mid_attention else []
    return nnx.List([res(width, width, key=keys[0]), *middle, res(width, width, key=keys[2])])


class Encoder(nnx.Module):
    """Image -> features, from high to low resolution."""

    def __init__(self, config: VQConfig, *, key: jax.Array):
        make_conv, _, _, norm = _layers(config)
        widths = config.widths
        keys = jax.random.split(key, len(widths) + 3)
        self.conv_in = make_conv(config.in_channels * config.stem_patch**2, widths[0], key=keys[0])
        self.conv_blocks = nnx.List(
            Level(
                config,
                i,
                widths[max(i - 1, 0)],
                config.encoder_blocks,
                "down" if i < len(widths) - 1 else None,
                key=keys[3 + i],
            )
            for i in range(len(widths))
        )
        self.mid = _mid(config, key=keys[1])
        self.norm_out = norm(widths[-1])
        self.conv_out = make_conv(widths[-1], config.z_channels, key=keys[2])
        self.config = config

    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w Z"]:
        """Returns features of `z_channels` at 1/downsample of the resolution."""
        x = self.conv_in(conv.space_to_depth(images_BHWC, self.config.stem_patch))
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = _apply(block, x, self.config.remat)
        return self.conv_out(nnx.swish(self.norm_out(x)))


class Decoder(nnx.Module):
    """Features -> image, from low to high resolution: the mirror of the encoder."""

    def __init__(self, config: VQConfig, *, key: jax.Array):
        make_conv, _, _, norm = _layers(config)
        widths = config.widths
        last = len(widths) - 1
        keys = jax.random.split(key, len(widths) + 3)
        self.conv_in = make_conv(config.z_channels, widths[-1], key=keys[0])
        self.mid = _mid(config, key=keys[1])
        self.conv_blocks = nnx.List(
            Level(config, i, widths[min(i + 1, last)], config.decoder_blocks, "up" if i else None, key=keys[3 + i])
            for i in reversed(range(len(widths)))
        )
        self.norm_out = norm(widths[0])
        self.conv_out = make_conv(widths[0], config.in_channels * config.stem_patch**2, key=keys[2])
        self.config = config

    def features(self, z_BhwZ: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        """Everything up to the last convolution."""
        x = self.conv_in(z_BhwZ)
        for block in self.mid:
            x = _apply(block, x, self.config.remat)
        for level in self.conv_blocks:
            x = level(x)
        return nnx.swish(self.norm_out(x))

    def to_pixels(self, features_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The last convolution, and depth-to-space."""
        pixels = self.conv_out(features_BHWC)
        return conv.depth_to_space(pixels, self.config.stem_patch).astype(layers.wide(pixels.dtype))


class VQModel(nnx.Module):
    """Image tokenizer; nothing mutates in a forward pass."""

    def __init__(self, config: VQConfig, *, key: jax.Array):
        make_conv, _, _, _ = _layers(config)
        keys = jax.random.split(key, 5)
        self.encoder = Encoder(config, key=keys[0])
        self.quant_conv = make_conv(config.z_channels, config.quantizer.code_dim, 1, key=keys[1])
        self.quantize = Quantizer(config.quantizer, param_dtype=layers.wide(config.param_dtype), key=keys[2])
        self.post_quant_conv = make_conv(config.quantizer.code_dim, config.z_channels, 1, key=keys[3])
        self.decoder = Decoder(config, key=keys[4])
        self.config = config

    def encode(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w Z"]:
        """Images in [-1, 1] -> continuous codes, before quantization (and before any l2 normalisation).

        Raises:
          UserError: if height or width is not a multiple of `config.downsample`.
        """
        _, H, W, C = images_BHWC.shape
        p = self.config.downsample
        if H % p or W % p or self.config.in_channels != C:
            raise UserError(
                f"images of {H} x {W} x {C} do not fit the tokenizer: it takes {self.config.in_channels} channels and"
                f" sides that are multiples of {p}."
            )
        return self.quant_conv(self.encoder(images_BHWC))

    def decode_features(self, zq_BhwZ: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        """Quantized codes -> the input of the decoder's last layer, through which adaptive weights pull gradients."""
        return self.decoder.features(self.post_quant_conv(zq_BhwZ))

    def to_pixels(self, features_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The decoder's last layer: features -> images, float32 (float64 in float64), not clipped to [-1, 1]."""
        return self.decoder.to_pixels(features_BHWC)

    def decode(self, zq_BhwZ: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        """Quantized codes -> images."""
        return self.to_pixels(self.decode_features(zq_BhwZ))

    def encode_codes(self, images_BHWC: Float[Array, "B H W C"]) -> Int[Array, "B h w"]:
        """Images in [-1, 1] -> code indices."""
        return self.quantize.nearest(self.encode(images_BHWC))

    def decode_codes(self, codes_Bhw: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
        """Code indices -> images."""
        return self.decode(self.quantize.lookup(codes_Bhw))

    def reconstruct(self, images_BHWC: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H W C"], Quantized]:
        """Images -> (reconstructions, the quantizer's result with its losses and counts)."""
        quantized = self.quantize(self.encode(images_BHWC))
        return self.decode(quantized.zq), quantized
