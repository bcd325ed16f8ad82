"""Convolutional image tokenizers of the VQGAN family, as configs and tables.

One network, many ways of naming its parts: LlamaGen's, those of taming-transformers and of what `transformers` made of
it (Janus, Chameleon), the Flax port that dalle-mini uses, and the PyTorch port of MaskGIT's. A `Style` says how the
parts are called; from it follow the table and, where no `config.json` tells, the sizes.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from imagegpt_jax.convert.core import CONV2D, SAME, Change, Rule, carry, drop, filled_in, renamed, rule
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.quantizers import QuantizerConfig
from imagegpt_jax.models.vq import VQConfig
from imagegpt_jax.weight_files.tensor import Tensor

# Codes compared at a time, where their number does not say otherwise.
_CHUNK = 16384
GROUPS, SHARED = 32, {"norm_groups": 32, "conv_impl": "xla"}


@dataclasses.dataclass(frozen=True)
class Style:
    """How a family of checkpoints calls the parts of the network.

    Attributes:
      down: level of the encoder, from high to low resolution.
      up: level of the decoder.
      up_from_low: whether level 0 of the decoder is that of the lowest resolution.
      res: residual block of a level.
      attn: attention of a level.
      mid: blocks of the middle, in order.
      upsample: convolution after upsampling.
      codebook: the codes.
      flax: whether arrays lie and are called as Flax has them.
      l2_normalize: whether codes are compared on the unit sphere.
      plain: MaskGIT's blocks, and no projections around the codes.
      unit_pixels: whether the network's pixels lie in [0, 1].
      carried: names that the network has no use for, and that go back as they came.
      dropped: names of other networks in the same file.
    """

    down: str = "down.{i}"
    up: str = "up.{i}"
    up_from_low: bool = False
    res: str = "block.{j}"
    attn: str = "attn.{j}"
    mid: tuple[str, ...] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    upsample: str = "upsample.conv"
    codebook: str = "quantize.embedding.weight"
    flax: bool = False
    l2_normalize: bool = False
    plain: bool = False
    unit_pixels: bool = False
    carried: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


_EVERYTHING = "{rest:.+}"
LLAMAGEN = Style(
    down="conv_blocks.{i}",
    up="conv_blocks.{i}",
    up_from_low=True,
    res="res.{j}",
    mid=("mid.0", "mid.1", "mid.2"),
    l2_normalize=True,
    carried=("quantize.codebook_used",),
)
JANUS = Style(up_from_low=True, l2_normalize=True)
TAMING = Style(dropped=(f"loss.{_EVERYTHING}",))
DALLE_MINI = Style(
    down="down_{i}",
    up="up_{i}",
    res="block_{j}",
    attn="attn_{j}",
    codebook="quantize.embedding.embedding",
    flax=True,
    unit_pixels=True,
)
MASKGIT = Style(mid=("mid.0", "mid.1"), upsample="upsample_conv", plain=True, unit_pixels=True)


# ------------------------------------------------------------------------------------------------------------ tables


def conv_rules(theirs: str, ours: str, change: Change = CONV2D) -> list[Rule]:
    """A convolution of PyTorch."""
    return [rule(f"{theirs}.weight", f"{ours}.kernel", change), rule(f"{theirs}.bias", f"{ours}.bias")]


def norm_rules(theirs: str, ours: str) -> list[Rule]:
    """A normalisation of PyTorch."""
    return [rule(f"{theirs}.weight", f"{ours}.scale"), rule(f"{theirs}.bias", f"{ours}.bias")]


def table(config: VQConfig, style: Style) -> list[Rule]:
    """The rules for a network of this config whose parts are called so."""

    def conv(theirs: str, ours: str) -> list[Rule]:
        if style.flax:
            return [rule(f"{theirs}.{k}", f"{ours}.{k}", SAME) for k in ("kernel", "bias")]
        return conv_rules(theirs, ours)

    def norm(theirs: str, ours: str) -> list[Rule]:
        if style.flax:
            return [rule(f"{theirs}.{k}", f"{ours}.{k}", SAME) for k in ("scale", "bias")]
        return norm_rules(theirs, ours)

    def res(theirs: str, ours: str) -> list[Rule]:
        convs = conv(f"{theirs}.{{conv:conv1|conv2|nin_shortcut}}", f"{ours}.{{conv}}")
        return convs + norm(f"{theirs}.{{norm:norm1|norm2}}", f"{ours}.{{norm}}")

    def attn(theirs: str, ours: str) -> list[Rule]:
        return conv(f"{theirs}.{{conv:q|k|v|proj_out}}", f"{ours}.{{conv}}") + norm(f"{theirs}.norm", f"{ours}.norm")

    def half(name: str, level: str, resample: tuple[str, str], up: bool) -> list[Rule]:
        rules = conv(f"{name}.{{conv:conv_in|conv_out}}", f"{name}.{{conv}}")
        rules += norm(f"{name}.norm_out", f"{name}.norm_out")
        levels = len(config.width_mults)
        for i in range(levels):
            index = levels - 1 - i if up and not style.up_from_low else i
            theirs, ours = f"{name}.{level.replace('{i}', str(index))}", f"{name}.conv_blocks.{i}"
            rules += res(f"{theirs}.{style.res}", f"{ours}.res.{{j}}")
            rules += attn(f"{theirs}.{style.attn}", f"{ours}.attn.{{j}}")
            rules += conv(f"{theirs}.{resample[0]}", f"{ours}.{resample[1]}")
        for i, part in enumerate(_mid(config, style)):
            block = attn if config.mid_attention and i == 1 else res
            rules += block(f"{name}.{part}", f"{name}.mid.{i}")
        return rules

    rules = half("encoder", style.down, ("downsample.conv", "downsample.conv"), up=False)
    if config.decoder:
        rules += half("decoder", style.up, (style.upsample, "upsample.conv"), up=True)
    rules.append(rule(style.codebook, "quantize.embedding"))
    if config.quant_conv:
        rules += conv("{conv:quant_conv|post_quant_conv}", "{conv}")
    return rules + carry(*style.carried) + drop(*style.dropped)


def _mid(config: VQConfig, style: Style) -> Sequence[str]:
    """Names of the blocks in the middle; without attention it has none."""
    if style.plain:
        return [f"mid.{i}" for i in range(config.mid_blocks)]
    return style.mid if config.mid_attention else (style.mid[0], style.mid[2])


# ------------------------------------------------------------------------------------------------- configs from files


# What their `config.json` may leave out.
_JANUS = {"embed_dim": 8, "num_embeddings": 16384, "latent_channels": 256, "in_channels": 3, "base_channels": 128,
          "channel_multiplier": (1, 1, 2, 2, 4), "num_res_blocks": 2, "out_channels": 3,
          "double_latent": False}  # fmt: skip
_CHAMELEON = {"embed_dim": 256, "num_embeddings": 8192, "latent_channels": 256, "resolution": 512, "in_channels": 3,
              "base_channels": 128, "channel_multiplier": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (),
              "double_latent": False}  # fmt: skip
# Keys of `config.json` -> keys of `VQConfig` that mean the same.
_KEYS = {"in_channels": "in_channels", "base_channels": "base_width", "channel_multiplier": "width_mults",
         "num_res_blocks": "encoder_blocks", "latent_channels": "z_channels",
         "double_latent": "double_latent"}  # fmt: skip


def janus_config(about: Mapping[str, Any]) -> VQConfig:
    """Config of a Janus VQVAE (arXiv:2410.13848) from its `config.json`: LlamaGen's network."""
    config = filled_in(about, _JANUS)
    return published(
        config,
        codes=config["num_embeddings"],
        l2_normalize=True,
        out_channels=other(config["out_channels"], config["in_channels"]),
        attention_levels=(len(config["channel_multiplier"]) - 1,),
    )


def chameleon_config(about: Mapping[str, Any], decoder: bool) -> VQConfig:
    """Config of a Chameleon VQVAE (arXiv:2405.09818) from its `config.json`; in `transformers` it has no decoder."""
    config = filled_in(about, _CHAMELEON)
    vanilla = about.get("attn_type", "vanilla") == "vanilla"  # None is "no attention"
    at = config["attn_resolutions"] if vanilla else ()
    levels = len(config["channel_multiplier"])
    sides = [config["resolution"]]
    for _ in range(levels - 1):
        sides.append(sides[-1] // 2)
    return published(
        config,
        codes=config["num_embeddings"],
        l2_normalize=False,
        attention_levels=tuple(i for i, side in enumerate(sides) if side in at),
        mid_attention=vanilla,
        decoder=decoder,
    )


def other(out_channels: int, in_channels: int) -> int:
    """`VQConfig.out_channels` for these."""
    return 0 if out_channels == in_channels else out_channels


def published(config: Mapping[str, Any], *, codes: int, l2_normalize: bool, **values: Any) -> VQConfig:
    """What the `config.json` of the tokenizers in `transformers` have in common."""
    return VQConfig(
        **renamed(config, _KEYS),
        decoder_blocks=config["num_res_blocks"] + 1,
        quantizer=quantizer(codes, config["embed_dim"], l2_normalize),
        **SHARED,
        **values,
    )


def quantizer(codes: int, dim: int, l2_normalize: bool) -> QuantizerConfig:
    """A codebook of any size."""
    chunk = _CHUNK if codes % _CHUNK == 0 or codes < _CHUNK else codes
    return QuantizerConfig(num_codes=codes, code_dim=dim, l2_normalize=l2_normalize, chunk_codes=chunk)


def infer_config(tensors: Mapping[str, Tensor], style: Style) -> VQConfig:
    """Config of a network by the names and shapes of its arrays; raises UserError if they are those of another."""
    out_axis, in_axis, kernel = (3, 2, "kernel") if style.flax else (0, 1, "weight")

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"the weights of a tokenizer have an array {name}, and these have none.")
        return tensors[name].shape

    def count(template: str) -> int:
        pattern = re.compile(re.escape(template).replace(r"\{n\}", r"(\d+)") + r"\..+")
        numbers = {int(match[1]) for name in tensors if (match := pattern.fullmatch(name))}
        return len(numbers)

    def level(half: str, template: str, i: int) -> str:
        return f"{half}.{template.replace('{i}', str(i))}"

    first = style.res.replace("{j}", "0")
    levels = count(f"encoder.{style.down.replace('{i}', '{n}')}")
    has_decoder = "decoder.conv_in." + kernel in tensors
    base = shape(f"encoder.conv_in.{kernel}")[out_axis]
    widths = [shape(f"{level('encoder', style.down, i)}.{first}.conv1.{kernel}")[out_axis] for i in range(levels)]
    uneven = [w for w in widths if w % base]
    if uneven:
        raise UserError(f"a level of {uneven[0]} channels is no multiple of the first convolution's {base}.")
    codes, dim = shape(style.codebook)
    z_out = shape(f"encoder.conv_out.{kernel}")[out_axis]
    z_channels = shape(f"decoder.conv_in.{kernel}")[in_axis] if has_decoder else z_out
    names = [level("encoder", style.down, i) for i in range(levels)]
    blocks = count(f"{names[0]}.{style.res.replace('{j}', '{n}')}")
    attended = [i for i, name in enumerate(names) if count(f"{name}.{style.attn.replace('{j}', '{n}')}")]
    up = level("decoder", style.up, 0)
    channels = shape(f"encoder.conv_in.{kernel}")[in_axis]
    out_channels = shape(f"decoder.conv_out.{kernel}")[out_axis] if has_decoder else channels
    return VQConfig(
        in_channels=channels,
        out_channels=other(out_channels, channels),
        base_width=base,
        width_mults=tuple(w // base for w in widths),
        encoder_blocks=blocks,
        decoder_blocks=count(f"{up}.{style.res.replace('{j}', '{n}')}") if has_decoder else blocks + 1,
        attention_levels=tuple(attended),
        mid_attention=not style.plain and f"encoder.{style.mid[1]}.q.{kernel}" in tensors,
        mid_blocks=count("encoder.mid.{n}") if style.plain else 2,
        z_channels=z_channels,
        double_latent=z_out == 2 * z_channels,
        quant_conv=not style.plain,
        plain_blocks=style.plain,
        unit_pixels=style.unit_pixels,
        decoder=has_decoder,
        quantizer=quantizer(codes, dim, style.l2_normalize),
        **SHARED,
    )


# --------------------------------------------------------------------------------------------------- the way back


def as_styled(config: VQConfig, style: Style) -> VQConfig:
    """The config that comes back if a network is written in a style: what the style has no place for is at default."""
    kept = ("in_channels", "out_channels", "base_width", "width_mults", "encoder_blocks", "decoder_blocks",
            "attention_levels", "mid_attention", "mid_blocks", "z_channels", "double_latent", "decoder")  # fmt: skip
    return VQConfig(
        **{name: getattr(config, name) for name in kept},
        quant_conv=not style.plain,
        plain_blocks=style.plain,
        unit_pixels=style.unit_pixels,
        quantizer=quantizer(config.quantizer.num_codes, config.quantizer.code_dim, style.l2_normalize),
        **SHARED,
    )


def about_of(config: VQConfig, codes: str = "num_embeddings") -> dict[str, Any]:
    """The inverse of `published`; `codes` is what their number is called."""
    sizes = {theirs: getattr(config, ours) for theirs, ours in _KEYS.items()}
    return sizes | {"embed_dim": config.quantizer.code_dim, codes: config.quantizer.num_codes}


def janus_about(config: VQConfig) -> dict[str, Any]:
    """The `config.json` of a JanusVQVAE for a tokenizer of this config."""
    names = {"architectures": ["JanusVQVAE"], "model_type": "janus_vqgan", "out_channels": config.image_channels}
    return names | about_of(config)


def chameleon_about(config: VQConfig) -> dict[str, Any]:
    """The `config.json` of a ChameleonVQVAE for a tokenizer of this config."""
    # Any resolution does, since only its halves name levels.
    side = 2 ** (len(config.width_mults) + 3)
    return {
        "architectures": ["ChameleonVQVAE"],
        "model_type": "chameleon_vqgan",
        "resolution": side,
        "attn_resolutions": [side >> level for level in config.attention_levels] or None,
        "attn_type": "vanilla" if config.mid_attention else "none",
        **about_of(config),
    }
