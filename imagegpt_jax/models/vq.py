"""The image tokenizer: convolutional encoder and decoder around a vector quantizer (VQGAN, arXiv:2012.09841).

At `VQConfig()` it is LlamaGen's VQ-16 (arXiv:2406.06525): 71.9 M parameters, module names as in its checkpoints. Other
published tokenizers of the family are other values of the config, with which `convert` reads their weights.
Shapes: B batch, H W pixels, h w grid of codes, C channels, Z code dimension, K codes. Images are float in [-1, 1].
"""

import dataclasses
import functools
import math
from typing import TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from imagegpt_jax.errors import UserError, at_least, check_ranges
from imagegpt_jax.models import conv, layers, logit_laplace, temporal
from imagegpt_jax.models.quantizers import Quantized, Quantizer, QuantizerConfig
from imagegpt_jax.parallel import sharding

Block = TypeVar("Block", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Shape and precision of a VQModel; the defaults are LlamaGen's VQ-16.

    Attributes:
      in_channels: channels of the image.
      out_channels: channels of the reconstruction; 0 = in_channels.
      stem_patch: space-to-depth patch before the first and after the last convolution; 1 is none.
      base_width: channels of the first level.
      width_mults: width of each level in units of `base_width`; each level but the last halves the resolution.
      encoder_blocks: residual blocks in each level of the encoder.
      decoder_blocks: residual blocks in each level of the decoder.
      attention_levels: indices of `width_mults` whose residual blocks are each followed by attention.
      attention_heads: heads of all attention.
      mid_attention: whether the middle of encoder and decoder has attention between its two residual blocks.
      mid_blocks: residual blocks in the middle of encoder and decoder; attention stands between two.
      z_channels: channels of the encoder's output, before the projection to `quantizer.code_dim`.
      double_latent: the encoder's output has twice as many channels, of which the published networks have no use: they
        decode and cannot encode.
      quant_conv: whether there are projections to `quantizer.code_dim` and back; without, it is `z_channels`.
      plain_blocks: MaskGIT's residual blocks, resampling and outer convolutions, see `conv.ResBlock`.
      spatial_norm: the decoder's norms are scaled and shifted by the codes, see `conv.SpatialNorm`.
      frames: frames of a film that become one grid of codes, with convolutions along time, see `temporal.Frames`;
        0 = a tokenizer of images.
      unit_pixels: the network's pixels lie in [0, 1]: images are mapped from [-1, 1] before it, and back after it.
      decoder: whether the tokenizer has a decoder; some published ones come without.
      logit_laplace: the decoder ends in a distribution of each pixel, `losses.basic.logit_laplace`, with twice the
        channels.
      norm_groups: groups of every group normalisation.
      conv_impl: "auto", "xla" or "winograd"; see `conv.Conv`.
      remat: whether to recompute each block in the backward pass instead of keeping its activations.
      dtype: dtype of the computation; norms' statistics and the quantizer stay in float32 (float64 if this is float64).
      param_dtype: dtype of the parameters.
      quantizer: the vector quantizer.
    """

    in_channels: int = 3
    out_channels: int = 0
    stem_patch: int = 1
    base_width: int = 128
    width_mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    attention_levels: tuple[int, ...] = (4,)
    attention_heads: int = 1
    mid_attention: bool = True
    mid_blocks: int = 2
    z_channels: int = 256
    double_latent: bool = False
    quant_conv: bool = True
    plain_blocks: bool = False
    spatial_norm: bool = False
    frames: int = 0
    unit_pixels: bool = False
    decoder: bool = True
    logit_laplace: bool = False
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
        attended = [self.widths[i] for i in self.attention_levels] + [self.widths[-1]] * self.mid_attention
        channels, heads = math.gcd(*attended), self.attention_heads  # 0 without attention, which any number divides
        if channels and (heads < 1 or channels % heads):
            legal = [n for n in range(1, channels + 1) if channels % n == 0]
            raise UserError(
                f"attention_heads={heads} does not divide the {' and '.join(map(str, sorted(set(attended))))} channels"
                f" of the layers with attention: give one of {', '.join(map(str, legal))}."
            )
        check_ranges(self, {"stem_patch": at_least(1, "no patches")})
        if self.mid_attention and self.mid_blocks != 2:
            raise UserError(
                f"mid_blocks={self.mid_blocks} leaves no middle for attention: give 2, or mid_attention=False."
            )
        if not self.quant_conv and self.z_channels != self.quantizer.code_dim:
            raise UserError(
                f"without quant_conv the codes have z_channels={self.z_channels} dimensions, and quantizer.code_dim is"
                f" {self.quantizer.code_dim}: make them equal."
            )

    @property
    def image_channels(self) -> int:
        """Channels of the reconstruction."""
        return self.out_channels or self.in_channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from high to low resolution."""
        return tuple(self.base_width * m for m in self.width_mults)

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return self.stem_patch * 2 ** (len(self.width_mults) - 1)


def _layers(config: VQConfig, decoder: bool):
    """Constructors of the layers, with what is the same for all of them filled in."""
    precision = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    norm = {"groups": config.norm_groups, "code_dim": _condition(config) if decoder else 0}
    impl = {"impl": config.conv_impl}
    return (
        functools.partial(conv.Conv, **impl, **precision),
        functools.partial(conv.ResBlock, plain=config.plain_blocks, **norm, **impl, **precision),
        functools.partial(conv.AttnBlock, heads=config.attention_heads, **norm, **precision),
        functools.partial(conv.make_norm, **norm, **precision),
    )


def _condition(config: VQConfig) -> int:
    """Dimension of the codes that the decoder's norms see; 0 where they see none."""
    return config.quantizer.code_dim if config.spatial_norm else 0


class Level(nnx.Module):
    """Residual blocks at one resolution, each followed by attention where asked, and the way to the next resolution."""

    def __init__(self, config: VQConfig, index: int, *, decoder: bool, key: jax.Array):
        _, res, attn, _ = _layers(config, decoder)
        width, last = config.widths[index], len(config.widths) - 1
        if decoder:
            blocks, in_width = config.decoder_blocks, config.widths[min(index + 1, last)]
        else:
            blocks, in_width = config.encoder_blocks, (config.base_width, *config.widths)[index]
        keys = iter(jax.random.split(key, 2 * blocks + 1))
        self.res = nnx.List([res(in_width if i == 0 else width, width, key=next(keys)) for i in range(blocks)])
        self.attn = nnx.List([attn(width, key=next(keys)) for _ in range(blocks * (index in config.attention_levels))])
        precision = {"impl": config.conv_impl, "dtype": config.dtype, "param_dtype": config.param_dtype}
        down = upsample = None
        if not decoder and index < last:
            down = conv.MeanPool() if config.plain_blocks else conv.Downsample(width, key=next(keys), **precision)
        elif decoder and index:
            upsample = conv.Upsample(width, key=next(keys), **precision)
        self.downsample, self.upsample = down, upsample
        self.remat = config.remat

    def __call__(self, x_BHWC: Float[Array, "B H W C"], z_BhwZ: Array | None = None) -> Float[Array, "B H2 W2 C2"]:
        """Applies the level; z are the codes, for spatial norms."""
        for i, block in enumerate(self.res):
            x_BHWC = _apply(block, x_BHWC, self.remat, z_BhwZ)
            if len(self.attn):
                x_BHWC = _apply(self.attn[i], x_BHWC, self.remat, z_BhwZ)
        for resample in (self.downsample, self.upsample):
            x_BHWC = x_BHWC if resample is None else resample(x_BHWC)
        return x_BHWC


def _apply(block: nnx.Module, x_BHWC: Array, remat: bool, z_BhwZ: Array | None = None) -> Array:
    def call(block, x, z):
        return block(x, z)

    x_BHWC = (jax.checkpoint(call) if remat else call)(block, x_BHWC, z_BhwZ)
    return sharding.constrain(x_BHWC, ("batch", None, None, None))


def _mid(config: VQConfig, *, decoder: bool, key: jax.Array) -> nnx.List:
    _, res, attn, _ = _layers(config, decoder)
    width = config.widths[-1]
    first, *keys = jax.random.split(key, config.mid_blocks + 1)
    blocks = [res(width, width, key=k) for k in (first, *keys[1:])]
    return nnx.List([blocks[0], attn(width, key=keys[0]), *blocks[1:]] if config.mid_attention else blocks)


class Encoder(nnx.Module):
    """Image -> features, from high to low resolution."""

    def __init__(self, config: VQConfig, *, key: jax.Array):
        make_conv, _, _, norm = _layers(config, False)
        widths = config.widths
        keys = jax.random.split(key, len(widths) + 3)
        plain = config.plain_blocks
        channels = config.in_channels * config.stem_patch**2
        self.conv_in = make_conv(channels, config.base_width, use_bias=not plain, key=keys[0])
        self.conv_blocks = nnx.List(Level(config, i, decoder=False, key=keys[3 + i]) for i in range(len(widths)))
        self.mid = _mid(config, decoder=False, key=keys[1])
        self.norm_out = norm(widths[-1], key=keys[2])
        z_channels = config.z_channels * (1 + config.double_latent)
        self.conv_out = make_conv(widths[-1], z_channels, 1 if plain else 3, key=keys[2])
        if config.frames:
            kinds = {"dtype": config.dtype, "param_dtype": config.param_dtype}
            frames_key = jax.random.fold_in(key, 0)
            self.temporal = temporal.Frames(
                z_channels, config.frames, config.encoder_blocks, encoder=True, key=frames_key, **kinds
            )
        self.config = config

    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w Z"]:
        """Returns features of `z_channels` at 1/downsample of the resolution."""
        x = self.conv_in(conv.space_to_depth(images_BHWC, self.config.stem_patch))
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = _apply(block, x, self.config.remat)
        x = self.conv_out(nnx.swish(conv.normalize(self.norm_out, x, None)))
        return self.temporal(x) if self.config.frames else x


class Decoder(nnx.Module):
    """Features -> image, from low to high resolution: the mirror of the encoder."""

    def __init__(self, config: VQConfig, *, key: jax.Array):
        make_conv, _, _, norm = _layers(config, True)
        widths = config.widths
        keys = jax.random.split(key, len(widths) + 3)
        if config.frames:
            kinds = {"dtype": config.dtype, "param_dtype": config.param_dtype}
            frames_key = jax.random.fold_in(key, 0)
            self.temporal = temporal.Frames(
                config.z_channels, config.frames, config.encoder_blocks, encoder=False, key=frames_key, **kinds
            )
        self.conv_in = make_conv(config.z_channels, widths[-1], key=keys[0])
        self.mid = _mid(config, decoder=True, key=keys[1])
        self.conv_blocks = nnx.List(
            Level(config, i, decoder=True, key=keys[3 + i]) for i in reversed(range(len(widths)))
        )
        self.norm_out = norm(widths[0], key=jax.random.fold_in(keys[2], 0))
        channels = config.image_channels * (2 if config.logit_laplace else 1)
        self.conv_out = make_conv(widths[0], channels * config.stem_patch**2, key=keys[2])
        self.config = config

    def features(
        self, z_BhwC: Float[Array, "B h w C"], codes_BhwZ: Float[Array, "B h w Z"] | None = None
    ) -> Float[Array, "B H W C"]:
        """Everything up to the last convolution; spatial norms also need the codes as they were looked up."""
        if self.config.frames:
            z_BhwC = self.temporal(z_BhwC)
            codes_BhwZ = None if codes_BhwZ is None else self.temporal(codes_BhwZ)
        x = self.conv_in(z_BhwC)
        for block in self.mid:
            x = _apply(block, x, self.config.remat, codes_BhwZ)
        for level in self.conv_blocks:
            x = level(x, codes_BhwZ)
        return nnx.swish(conv.normalize(self.norm_out, x, codes_BhwZ))

    def output(self, features_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The last convolution, and depth-to-space."""
        output = self.conv_out(features_BHWC)
        return conv.depth_to_space(output, self.config.stem_patch).astype(layers.accumulation_dtype(output.dtype))


def _projection(
    config: VQConfig, in_channels: int, out_channels: int, *, key: jax.Array
) -> conv.Conv | temporal.Conv3d | None:
    kinds = {"dtype": config.dtype, "param_dtype": config.param_dtype, "key": key}
    if not config.quant_conv:
        return None
    if config.frames:
        return temporal.Conv3d(in_channels, out_channels, (3, 1, 1), **kinds)
    return conv.Conv(in_channels, out_channels, 1, impl=config.conv_impl, **kinds)


def _project(layer: conv.Conv | temporal.Conv3d | None, x_BhwC: Array) -> Array:
    if layer is None:
        return x_BhwC
    return layer(x_BhwC[:, None])[:, 0] if isinstance(layer, temporal.Conv3d) else layer(x_BhwC)


class VQModel(nnx.Module):
    """Image tokenizer; nothing mutates in a forward pass."""

    def __init__(self, config: VQConfig, *, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.encoder = Encoder(config, key=keys[0])
        self.quant_conv = _projection(config, config.z_channels, config.quantizer.code_dim, key=keys[1])
        self.quantize = Quantizer(
            config.quantizer, param_dtype=layers.accumulation_dtype(config.param_dtype), key=keys[2]
        )
        self.post_quant_conv = _projection(config, config.quantizer.code_dim, config.z_channels, key=keys[3])
        self.decoder = Decoder(config, key=keys[4]) if config.decoder else None
        self.config = config

    def encode(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w Z"]:
        """Images in [-1, 1] -> codes before quantization and l2 normalisation; raises UserError if they do not fit."""
        _, H, W, C = images_BHWC.shape
        p = self.config.downsample
        if H % p or W % p or self.config.in_channels != C:
            raise UserError(
                f"images of {H} x {W} x {C} do not fit the tokenizer: it takes {self.config.in_channels} channels and"
                f" sides that are multiples of {p}."
            )
        if self.config.double_latent:
            raise UserError(
                "a tokenizer with double_latent cannot encode: its projection takes half of what comes out."
            )
        pixels_BHWC = (images_BHWC + 1) / 2 if self.config.unit_pixels else images_BHWC
        return _project(self.quant_conv, self.encoder(pixels_BHWC))

    def decode_features(self, zq_BhwZ: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        """Quantized codes -> the input of the decoder's last layer, through which adaptive weights pull gradients."""
        if self.decoder is None:
            raise UserError("this tokenizer has no decoder: its weights came without one, so it can only encode.")
        if self.config.frames and self.config.spatial_norm and self.config.z_channels != self.config.quantizer.code_dim:
            raise UserError("a tokenizer of films decodes only if z_channels and quantizer.code_dim are equal.")
        codes_BhwZ = zq_BhwZ if self.config.spatial_norm else None
        return self.decoder.features(_project(self.post_quant_conv, zq_BhwZ), codes_BhwZ)

    def output(self, features_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The decoder's last layer, float32 (float64 in float64): images, or with `logit_laplace` means and log scales
        of the pixels' logits, one after the other in the channels."""
        assert self.decoder is not None
        output_BHWC = self.decoder.output(features_BHWC)
        return 2 * output_BHWC - 1 if self.config.unit_pixels else output_BHWC

    def pixels(self, output_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """What the last layer gives -> images, not clipped to [-1, 1]."""
        if not self.config.logit_laplace:
            return output_BHWC
        return logit_laplace.pixels(output_BHWC[..., : self.config.image_channels])

    def to_pixels(self, features_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Features -> images, float32 (float64 in float64), not clipped to [-1, 1]."""
        return self.pixels(self.output(features_BHWC))

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
