"""What each kind of published weights looks like, and how it becomes a config, a table and named arrays."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from imagegpt_jax.cli import UserError
from imagegpt_jax.convert import emu3, gpt_tables, llamagen, vqgan
from imagegpt_jax.convert.core import Rule, Tensor, drop, rule
from imagegpt_jax.convert.files import PROCESSORS, Source
from imagegpt_jax.convert.layout import ImageSpace, RasterLayout
from imagegpt_jax.convert.networks import Config
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.models.palette import PaletteConfig
from imagegpt_jax.models.vq import VQConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """What the weights may not tell.

    Attributes:
      heads: of a LlamaGen decoder of unpublished size.
      grid: (rows, columns) of codes of its pictures.
    """

    heads: int | None = None
    grid: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Published:
    """Published weights, ready to be read.

    Attributes:
      format: name in `FORMATS`.
      config: of the network.
      table: from their names to ours.
      tensors: the arrays.
      layout: how pictures become sequences, for decoders of images.
      about: the published `config.json`, kept for the way back.
      prefix: what stands before their names within a larger model.
    """

    format: str
    config: Config
    table: list[Rule]
    tensors: Mapping[str, Tensor]
    layout: RasterLayout | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prefix: str = ""


# ----------------------------------------------------------------------------------------------------------- helpers


def _inside(source: Source, model_type: str, part: str) -> tuple[Mapping[str, Any], Mapping[str, Tensor], str] | None:
    """(config, tensors without prefix, prefix) of a tokenizer that is saved alone or in a model that contains it."""
    config = source.config
    if config.get("model_type") == model_type:
        return config, source.tensors, ""
    inner = config.get("vq_config")
    family = model_type.partition("_")[0]
    if not isinstance(inner, Mapping) or config.get("model_type") != family:
        return None
    pattern = re.compile(rf"((?:.*\.)?{part}\.)(.+)")
    matches = {name: match for name in source.tensors if (match := pattern.fullmatch(name))}
    prefixes = sorted({match[1] for match in matches.values()}, key=len)
    if not prefixes:
        raise UserError(f"{source.path} is a {config.get('model_type')} without the weights of its {part}.")
    prefix = prefixes[0]
    return inner, {m[2]: source.tensors[n] for n, m in matches.items() if m[1] == prefix}, prefix


def with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` with the values that its class would fill in."""
    return {**defaults, **{key: value for key, value in config.items() if value is not None}}


# -------------------------------------------------------------------------------------------------------- tokenizers

JANUS = {"embed_dim": 8, "num_embeddings": 16384, "latent_channels": 256, "in_channels": 3, "base_channels": 128,
          "channel_multiplier": (1, 1, 2, 2, 4), "num_res_blocks": 2, "out_channels": 3}  # fmt: skip
CHAMELEON = {"embed_dim": 256, "num_embeddings": 8192, "latent_channels": 256, "resolution": 512, "in_channels": 3,
              "base_channels": 128, "channel_multiplier": (1, 1, 2, 2, 4), "num_res_blocks": 2}  # fmt: skip
EMU3 = {"codebook_size": 32768, "embed_dim": 4, "latent_channels": 4, "in_channels": 3, "out_channels": 3,
         "temporal_downsample_factor": 4, "base_channels": 256, "channel_multiplier": (1, 2, 2, 4), "num_res_blocks": 2,
         "attn_resolutions": (3,), "hidden_size": 1024, "num_attention_heads": 1}  # fmt: skip


def janus(source: Source, options: Options) -> Published | None:
    """Janus; None if the source is something else."""
    found = _inside(source, "janus_vqgan", "vqmodel")
    if found is None:
        return None
    about, tensors, prefix = found
    config = vqgan.janus_config(with_defaults(about, JANUS))
    return Published("janus", config, vqgan.table(config, vqgan.JANUS), tensors, about=about, prefix=prefix)


def chameleon(source: Source, options: Options) -> Published | None:
    """Chameleon; None if the source is something else."""
    found = _inside(source, "chameleon_vqgan", "vqmodel")
    if found is None:
        return None
    about, tensors, prefix = found
    config = parse_chameleon(about, "decoder.conv_in.weight" in tensors)
    return Published("chameleon", config, vqgan.table(config, vqgan.TAMING), tensors, about=about, prefix=prefix)


def parse_chameleon(about: Mapping[str, Any], decoder: bool) -> VQConfig:
    """Config of a Chameleon VQVAE; `decoder`: whether the weights have one."""
    # None means "no attention" here, not "the default".
    values = {**with_defaults(about, CHAMELEON), "attn_type": about.get("attn_type", "vanilla")}
    return vqgan.chameleon_config(values, decoder)


def emu3_vqvae(source: Source, options: Options) -> Published | None:
    """Emu3; None if the source is something else."""
    found = _inside(source, "emu3_vqgan", "vqmodel")
    if found is None:
        return None
    about, tensors, prefix = found
    config = emu3.emu3_config(with_defaults(about, EMU3))
    return Published("emu3", config, emu3.emu3_table(config), tensors, about=about, prefix=prefix)


def _inferred(name: str, source: Source, style: vqgan.Style) -> Published:
    config = vqgan.infer_config(source.tensors, style)
    return Published(name, config, vqgan.table(config, style), source.tensors, about=source.config)


def llamagen_vq(source: Source, options: Options) -> Published | None:
    """LlamaGen's tokenizers; None if the source is something else."""
    if "encoder.conv_blocks.0.res.0.conv1.weight" not in source.tensors:
        return None
    return _inferred("llamagen_vq", source, vqgan.LLAMAGEN)


def taming(source: Source, options: Options) -> Published | None:
    """taming-transformers' VQGAN, or Janus' without its config; None if the source is something else."""
    tensors = source.tensors
    if "encoder.down.0.block.0.conv1.weight" not in tensors or "quant_conv.weight" not in tensors:
        return None
    # Janus' VQVAE without its config: level 0 of the decoder is that of the lowest resolution, and is enlarged.
    last = max(int(m[1]) for name in tensors if (m := re.match(r"encoder\.down\.(\d+)\.", name)))
    if last and "decoder.up.0.upsample.conv.weight" in tensors:
        return _inferred("janus", source, vqgan.JANUS)
    return _inferred("taming", source, vqgan.TAMING)


def dalle_mini(source: Source, options: Options) -> Published | None:
    """dalle-mini's VQGAN; None if the source is something else."""
    if "encoder.down_0.block_0.conv1.kernel" not in source.tensors:
        return None
    return _inferred("dalle_mini_vqgan", source, vqgan.DALLE_MINI)


def maskgit(source: Source, options: Options) -> Published | None:
    """MaskGIT's VQGAN; None if the source is something else."""
    tensors = source.tensors
    if "encoder.down.0.block.0.conv1.weight" not in tensors or "encoder.mid.0.conv1.weight" not in tensors:
        return None
    return _inferred("maskgit_vqgan", source, vqgan.MASKGIT)


def clusters(source: Source, options: Options) -> Published | None:
    """The colours of an ImageGPT lie in the config of its image processor."""
    for name in PROCESSORS:
        path = source.folder / name
        if not path.exists():
            continue
        about = json.loads(path.read_text())
        about = about.get("image_processor", about)
        if about.get("clusters") is not None:
            colours = np.asarray(about["clusters"], np.float32)
            tensors = {"clusters": Tensor(colours.shape, colours.dtype, colours.copy)}
            config = PaletteConfig(num_codes=colours.shape[0], in_channels=colours.shape[1])
            return Published("imagegpt_clusters", config, clusters_table(config), tensors, about=about)
    return None


def clusters_table(config: PaletteConfig) -> list[Rule]:
    """The colours, whatever else the file says."""
    return [rule("clusters", "quantize.embedding"), *drop("{rest:(?!clusters$).+}")]


# ---------------------------------------------------------------------------------------------------------- decoders


def _prefix(source: Source, base: str, first: str) -> str:
    """What stands before the names of a model's body: its name in the class with a head, else nothing."""
    return "" if first in source.tensors else base


def llama(source: Source, options: Options) -> Published | None:
    """Llama; None if the source is something else."""
    if source.config.get("model_type") != "llama":
        return None
    config = gpt_tables.llama_config(with_defaults(source.config, LLAMA))
    _check_head(source, config)
    prefix = _prefix(source, "model.", "embed_tokens.weight")
    return Published("llama", config, gpt_tables.llama_table(config, prefix), source.tensors, about=source.config)


# What `config.json` may leave out.
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
          "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}  # fmt: skip
GPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
IMAGEGPT = {"vocab_size": 513, "n_positions": 1024, "n_embd": 512, "n_layer": 24, "n_head": 8}


def gpt2(source: Source, options: Options) -> Published | None:
    """GPT-2; None if the source is something else."""
    if source.config.get("model_type") != "gpt2":
        return None
    config = gpt_tables.gpt2_config(with_defaults(source.config, GPT2))
    _check_head(source, config)
    prefix = _prefix(source, "transformer.", "wte.weight")
    return Published("gpt2", config, gpt_tables.gpt2_table(config, prefix), source.tensors, about=source.config)


def imagegpt(source: Source, options: Options) -> Published | None:
    """ImageGPT; None if the source is something else."""
    if source.config.get("model_type") != "imagegpt":
        return None
    config = gpt_tables.imagegpt_config(with_defaults(source.config, IMAGEGPT))
    _check_head(source, config)
    prefix = _prefix(source, "transformer.", "wte.weight")
    codes = config.vocab_size - 1
    side = math.isqrt(config.max_length)
    layout = RasterLayout(
        space=ImageSpace(num_codes=codes, vocab_size=config.vocab_size, begin=codes), grid=(side, side), by_row=False
    )
    table = gpt_tables.gpt2_table(config, prefix)
    return Published("imagegpt", config, table, source.tensors, layout, about=source.config)


def _check_head(source: Source, config: GPTConfig) -> None:
    if not config.tie_embeddings and "lm_head.weight" not in source.tensors:
        raise UserError(
            f"{source.path} holds a model without its output head (lm_head): save the class that has one, such as"
            " LlamaForCausalLM, GPT2LMHeadModel or ImageGPTForCausalImageModeling."
        )


def llamagen_decoder(source: Source, options: Options) -> Published | None:
    """LlamaGen's decoders; None if the source is something else."""
    if not llamagen.is_llamagen(source.tensors):
        return None
    about = llamagen.settings(source.config, source.extras)
    config = llamagen.config(source.tensors, about, options.heads)
    side = math.isqrt(about["block_size"]) if about.get("block_size") else 0
    grid = options.grid or ((side, side) if side else llamagen.GRID)
    codes = config.head_size or config.vocab_size
    space = ImageSpace(
        num_codes=codes,
        vocab_size=config.vocab_size,
        begin=0 if config.feature_width else config.vocab_size - 1,
        num_classes=max(config.vocab_size - codes - 1, 0),
        class_start=codes,
    )
    layout = RasterLayout(space=space, grid=grid, by_row=True)
    return Published("llamagen", config, llamagen.table(config), source.tensors, layout, about=about)
