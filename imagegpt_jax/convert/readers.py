"""What each kind of published weights looks like, and how it becomes a config, a table and named arrays."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from imagegpt_jax.convert import emu3, gpt_tables, llamagen, maskgit_flax, vqgan
from imagegpt_jax.convert.core import Rule, drop, rule
from imagegpt_jax.convert.layout import ImageSpace, RasterLayout
from imagegpt_jax.convert.networks import Config
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.models.palette import PaletteConfig
from imagegpt_jax.models.vq import VQConfig
from imagegpt_jax.weight_files.files import PROCESSORS, Source
from imagegpt_jax.weight_files.tensor import Tensor


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


# What a reader is: source -> Published, or None if the source is something else.
Reader = Callable[[Source, Options], Published | None]


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


# -------------------------------------------------------------------------------------------------------- tokenizers


def _tokenizer(
    name: str, model_type: str, parse: Callable[[Mapping[str, Any], bool], VQConfig], table: Callable[..., list[Rule]]
) -> Reader:
    """Reads a tokenizer of `transformers`; `parse` makes a config of its own and of whether there is a decoder."""

    def read(source: Source, options: Options) -> Published | None:
        inside = _inside(source, model_type, "vqmodel")
        if inside is None:
            return None
        about, tensors, prefix = inside
        config = parse(about, "decoder.conv_in.weight" in tensors)
        return Published(name, config, table(config), tensors, about=about, prefix=prefix)

    return read


janus = _tokenizer(
    "janus", "janus_vqgan", lambda about, _: vqgan.janus_config(about), lambda c: vqgan.table(c, vqgan.JANUS)
)
chameleon = _tokenizer("chameleon", "chameleon_vqgan", vqgan.chameleon_config, lambda c: vqgan.table(c, vqgan.TAMING))
emu3_vqvae = _tokenizer("emu3", "emu3_vqgan", lambda about, _: emu3.emu3_config(about), emu3.emu3_table)


def _styled(name: str, style: vqgan.Style, *marks: str) -> Reader:
    """Reads a tokenizer whose names and shapes tell its config; `marks` are names that only its kind has together."""

    def read(source: Source, options: Options) -> Published | None:
        if not all(mark in source.tensors for mark in marks):
            return None
        config = vqgan.infer_config(source.tensors, style)
        return Published(name, config, vqgan.table(config, style), source.tensors, about=source.config)

    return read


llamagen_vq = _styled("llamagen_vq", vqgan.LLAMAGEN, "encoder.conv_blocks.0.res.0.conv1.weight")
dalle_mini = _styled("dalle_mini_vqgan", vqgan.DALLE_MINI, "encoder.down_0.block_0.conv1.kernel")
_TORCH_BLOCK = "encoder.down.0.block.0.conv1.weight"
maskgit = _styled("maskgit_vqgan", vqgan.MASKGIT, _TORCH_BLOCK, "encoder.mid.0.conv1.weight")
_taming = _styled("taming", vqgan.TAMING, _TORCH_BLOCK, "quant_conv.weight")
# Janus' VQVAE without its config: level 0 of the decoder is that of the lowest resolution, and is enlarged.
_bare_janus = _styled("janus", vqgan.JANUS, _TORCH_BLOCK, "quant_conv.weight", "decoder.up.0.upsample.conv.weight")


def taming(source: Source, options: Options) -> Published | None:
    """taming-transformers' VQGAN, or Janus' without its config; None if the source is something else."""
    halved = any(re.match(r"encoder\.down\.[1-9]", name) for name in source.tensors)
    bare = _bare_janus(source, options) if halved else None
    return _taming(source, options) if bare is None else bare


def maskgit_original(source: Source, options: Options) -> Published | None:
    """MaskGIT's VQGAN under its authors' names; None if the source is something else."""
    if not maskgit_flax.is_maskgit(source.tensors):
        return None
    config = maskgit_flax.config(source.tensors)
    return Published("maskgit_flax", config, maskgit_flax.table(config), source.tensors, about=source.config)


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


def _decoder(
    name: str,
    parse: Callable[[Mapping[str, Any]], GPTConfig],
    table: Callable[[GPTConfig, str], list[Rule]],
    body: tuple[str, str],
    layout: Callable[[GPTConfig], RasterLayout | None] = lambda config: None,
) -> Reader:
    """Reads a decoder of `transformers`, called `name` there too.

    `body` is what stands before the names of the body, which `table` takes beside the config, in the class with a head,
    and a name that the body has without it; `layout` is how its pictures become sequences.
    """

    def read(source: Source, options: Options) -> Published | None:
        if source.config.get("model_type") != name:
            return None
        config = parse(source.config)
        _check_head(source, config)
        rules = table(config, "" if body[1] in source.tensors else body[0])
        return Published(name, config, rules, source.tensors, layout(config), about=source.config)

    return read


def _pixels_in_order(config: GPTConfig) -> RasterLayout:
    """ImageGPT's: a square of colours after a token of its own, the last one."""
    codes, side = config.vocab_size - 1, math.isqrt(config.max_length)
    space = ImageSpace(num_codes=codes, vocab_size=config.vocab_size, begin=codes)
    return RasterLayout(space=space, grid=(side, side), by_row=False)


llama = _decoder("llama", gpt_tables.llama_config, gpt_tables.llama_table, ("model.", "embed_tokens.weight"))
gpt2 = _decoder("gpt2", gpt_tables.gpt2_config, gpt_tables.gpt2_table, ("transformer.", "wte.weight"))
imagegpt = _decoder(
    "imagegpt", gpt_tables.imagegpt_config, gpt_tables.gpt2_table, ("transformer.", "wte.weight"), _pixels_in_order
)


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
