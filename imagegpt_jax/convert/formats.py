"""Which published weights a path holds: recognised by content, never by the name of the file.

`FORMATS` is the matrix of what is read and written; each entry names the functions that the work is done by.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from imagegpt_jax import config as config_lib
from imagegpt_jax.cli import UserError
from imagegpt_jax.convert import emu3, gpt_tables, llamagen, vqgan
from imagegpt_jax.convert.core import Rule, Tensor, drop, rule
from imagegpt_jax.convert.files import PROCESSORS, Source, Writer, write_clusters, write_folder, write_msgpack
from imagegpt_jax.convert.layout import ImageSpace, RasterLayout
from imagegpt_jax.convert.networks import Config
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.models.palette import PaletteConfig
from imagegpt_jax.models.vq import VQConfig

TOKENIZER, DECODER = "tokenizer", "decoder"


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


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of published weights.

    Attributes:
      kind: TOKENIZER or DECODER.
      title: what it is, for people.
      files: what it lies in.
      writes: what is written.
      read: source -> Published, or None if the source is something else.
      table: config -> rules, for writing.
      about: config, layout -> `config.json` to write beside the weights; {} where there is none.
      parse: (config to write, `config.json`) -> config that one gets back by reading it.
      write: writes the files.
      defaults: arrays that the layout has and no network of ours, by their names.
    """

    kind: str
    title: str
    files: str
    read: Callable[[Source, Options], Published | None]
    table: Callable[[Any], list[Rule]]
    about: Callable[[Any, RasterLayout | None], dict[str, Any]]
    parse: Callable[[Any, Mapping[str, Any]], Config]
    writes: str = "`model.safetensors`, `config.json`"
    write: Writer = write_folder
    defaults: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def misfits(self, config: Config, about: Mapping[str, Any]) -> list[str]:
        """Keys of a config, with their values, that would not come back from this layout."""
        back = self.parse(config, about)
        if type(back) is not type(config):
            return [f"network of the kind {type(config).__name__}"]
        ours, theirs = (config_lib.flatten(dataclasses.asdict(_filled_in(c))) for c in (config, back))
        return [
            f"{key}={value!r}" for key, value in ours.items() if _matters(key) and _plain(value) != _plain(theirs[key])
        ]


# Keys that change how a network is trained or run, and not what it computes from given weights.
_HARMLESS = re.compile(
    r"(d|param_d)type|remat|scan|conv_impl|attention|\w+_dropout|max_length"
    r"|quantizer\.(\w+_weight|\w+_temperature|\w+_steps|\w+_decay|\w+_update|chunk_codes)"
)


def _filled_in(config: Config) -> Config:
    """A decoder's config with what its zeros stand for."""
    if not isinstance(config, GPTConfig):
        return config
    by_name = "silu" if config.mlp == "swiglu" else "gelu_tanh"
    return dataclasses.replace(
        config,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_width,
        rotary_dims=config.rotary_axes if config.position == "rope" else (),
        activation=config.activation or by_name,
    )


def _matters(key: str) -> bool:
    return not _HARMLESS.fullmatch(key)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


class Unknown(UserError):
    """A source holds nothing that is known, or nothing of the kind that is asked for."""


def recognise(source: Source, kind: str, options: Options = Options()) -> Published:
    """Finds out what a source holds.

    Args:
      source: the files.
      kind: TOKENIZER or DECODER: some folders hold both.
      options: what the weights do not tell.

    Raises:
      Unknown: if it holds nothing that is known, or nothing of this kind.
      UserError: if what it holds has a value that is not supported.
    """
    for entry in FORMATS.values():
        if entry.kind == kind and (found := entry.read(source, options)) is not None:
            return found
    other = [f.title for f in FORMATS.values() if f.kind != kind and f.read(source, options) is not None]
    known = "; ".join(f.title for f in FORMATS.values() if f.kind == kind)
    holds = f"holds a {other[0]}" if other else f"is of the model_type {source.config.get('model_type')!r}"
    raise Unknown(f"{source.path} {holds}, and no {kind} that is known here. Known: {known}.")


# ----------------------------------------------------------------------------------------------------------- helpers


def _inside(source: Source, model_type: str, part: str) -> tuple[Mapping[str, Any], Mapping[str, Tensor], str] | None:
    """(config, tensors without prefix, prefix) of a tokenizer that is saved alone or in a model that contains it."""
    config = source.config
    if config.get("model_type") == model_type:
        return config, source.tensors, ""
    inner = config.get("vq_config")
    if not isinstance(inner, Mapping) or inner.get("model_type", model_type) != model_type:
        return None
    pattern = re.compile(rf"((?:.*\.)?{part}\.)(.+)")
    matches = {name: match for name in source.tensors if (match := pattern.fullmatch(name))}
    prefixes = sorted({match[1] for match in matches.values()}, key=len)
    if not prefixes:
        raise UserError(f"{source.path} is a {config.get('model_type')} without the weights of its {part}.")
    prefix = prefixes[0]
    return inner, {m[2]: source.tensors[n] for n, m in matches.items() if m[1] == prefix}, prefix


def _with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` with the values that its class would fill in."""
    return {**defaults, **{key: value for key, value in config.items() if value is not None}}


# -------------------------------------------------------------------------------------------------------- tokenizers

_JANUS = {"embed_dim": 8, "num_embeddings": 16384, "latent_channels": 256, "in_channels": 3, "base_channels": 128,
          "channel_multiplier": (1, 1, 2, 2, 4), "num_res_blocks": 2, "out_channels": 3}  # fmt: skip
_CHAMELEON = {"embed_dim": 256, "num_embeddings": 8192, "latent_channels": 256, "resolution": 512, "in_channels": 3,
              "base_channels": 128, "channel_multiplier": (1, 1, 2, 2, 4), "num_res_blocks": 2}  # fmt: skip
_EMU3 = {"codebook_size": 32768, "embed_dim": 4, "latent_channels": 4, "in_channels": 3, "out_channels": 3,
         "temporal_downsample_factor": 4, "base_channels": 256, "channel_multiplier": (1, 2, 2, 4), "num_res_blocks": 2,
         "attn_resolutions": (3,), "hidden_size": 1024, "num_attention_heads": 1}  # fmt: skip


def _read_janus(source: Source, options: Options) -> Published | None:
    found = _inside(source, "janus_vqgan", "vqmodel")
    if found is None:
        return None
    about, tensors, prefix = found
    config = vqgan.janus_config(_with_defaults(about, _JANUS))
    return Published("janus", config, vqgan.table(config, vqgan.JANUS), tensors, about=about, prefix=prefix)


def _read_chameleon(source: Source, options: Options) -> Published | None:
    found = _inside(source, "chameleon_vqgan", "vqmodel")
    if found is None:
        return None
    about, tensors, prefix = found
    config = _parse_chameleon(about, "decoder.conv_in.weight" in tensors)
    return Published("chameleon", config, vqgan.table(config, vqgan.TAMING), tensors, about=about, prefix=prefix)


def _parse_chameleon(about: Mapping[str, Any], decoder: bool) -> VQConfig:
    # None means "no attention" here, not "the default".
    values = {**_with_defaults(about, _CHAMELEON), "attn_type": about.get("attn_type", "vanilla")}
    return vqgan.chameleon_config(values, decoder)


def _read_emu3(source: Source, options: Options) -> Published | None:
    found = _inside(source, "emu3_vqgan", "vqmodel")
    if found is None:
        return None
    about, tensors, prefix = found
    config = emu3.emu3_config(_with_defaults(about, _EMU3))
    return Published("emu3", config, emu3.emu3_table(config), tensors, about=about, prefix=prefix)


def _inferred(name: str, source: Source, style: vqgan.Style) -> Published:
    config = vqgan.infer_config(source.tensors, style)
    return Published(name, config, vqgan.table(config, style), source.tensors, about=source.config)


def _read_llamagen_vq(source: Source, options: Options) -> Published | None:
    if "encoder.conv_blocks.0.res.0.conv1.weight" not in source.tensors:
        return None
    return _inferred("llamagen_vq", source, vqgan.LLAMAGEN)


def _read_taming(source: Source, options: Options) -> Published | None:
    tensors = source.tensors
    if "encoder.down.0.block.0.conv1.weight" not in tensors or "quant_conv.weight" not in tensors:
        return None
    # Janus' VQVAE without its config: level 0 of the decoder is that of the lowest resolution, and is enlarged.
    last = max(int(m[1]) for name in tensors if (m := re.match(r"encoder\.down\.(\d+)\.", name)))
    if last and "decoder.up.0.upsample.conv.weight" in tensors:
        return _inferred("janus", source, vqgan.JANUS)
    return _inferred("taming", source, vqgan.TAMING)


def _read_dalle_mini(source: Source, options: Options) -> Published | None:
    if "encoder.down_0.block_0.conv1.kernel" not in source.tensors:
        return None
    return _inferred("dalle_mini_vqgan", source, vqgan.DALLE_MINI)


def _read_maskgit(source: Source, options: Options) -> Published | None:
    tensors = source.tensors
    if "encoder.down.0.block.0.conv1.weight" not in tensors or "encoder.mid.0.conv1.weight" not in tensors:
        return None
    return _inferred("maskgit_vqgan", source, vqgan.MASKGIT)


def _read_clusters(source: Source, options: Options) -> Published | None:
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
            return Published("imagegpt_clusters", config, _clusters_table(config), tensors, about=about)
    return None


def _clusters_table(config: PaletteConfig) -> list[Rule]:
    return [rule("clusters", "quantize.embedding"), *drop("{rest:(?!clusters$).+}")]


# ---------------------------------------------------------------------------------------------------------- decoders


def _prefix(source: Source, base: str, first: str) -> str:
    """What stands before the names of a model's body: its name in the class with a head, else nothing."""
    return "" if first in source.tensors else base


def _read_llama(source: Source, options: Options) -> Published | None:
    if source.config.get("model_type") != "llama":
        return None
    config = gpt_tables.llama_config(_with_defaults(source.config, _LLAMA))
    _check_head(source, config)
    prefix = _prefix(source, "model.", "embed_tokens.weight")
    return Published("llama", config, gpt_tables.llama_table(config, prefix), source.tensors, about=source.config)


# What `config.json` may leave out.
_LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
          "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}  # fmt: skip
_GPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
_IMAGEGPT = {"vocab_size": 513, "n_positions": 1024, "n_embd": 512, "n_layer": 24, "n_head": 8}


def _read_gpt2(source: Source, options: Options) -> Published | None:
    if source.config.get("model_type") != "gpt2":
        return None
    config = gpt_tables.gpt2_config(_with_defaults(source.config, _GPT2))
    _check_head(source, config)
    prefix = _prefix(source, "transformer.", "wte.weight")
    return Published("gpt2", config, gpt_tables.gpt2_table(config, prefix), source.tensors, about=source.config)


def _read_imagegpt(source: Source, options: Options) -> Published | None:
    if source.config.get("model_type") != "imagegpt":
        return None
    config = gpt_tables.imagegpt_config(_with_defaults(source.config, _IMAGEGPT))
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


def _read_llamagen(source: Source, options: Options) -> Published | None:
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


# ------------------------------------------------------------------------------------------------------------ matrix


def _no_about(config: Any, layout: RasterLayout | None) -> dict[str, Any]:
    return {}


def _styled(
    kind_title: str, where: str, read: Callable[[Source, Options], Published | None], style: vqgan.Style, **more: Any
) -> Format:
    """A tokenizer without a config of its own."""

    def table(config: VQConfig) -> list[Rule]:
        return vqgan.table(config, style)

    def parse(config: Any, about: Mapping[str, Any]) -> Config:
        return vqgan.as_styled(config, style) if isinstance(config, VQConfig) else VQConfig()

    writes = more.pop("writes", "`model.safetensors`")
    return Format(TOKENIZER, kind_title, where, read, table, _no_about, parse, writes=writes, **more)


_HF = "folder of `save_pretrained`: `config.json` and safetensors, in one file or shards"
_UNUSED = np.zeros(65536, np.float32)  # LlamaGen counts use in a fixed number of slots
FORMATS: dict[str, Format] = {
    "janus": Format(
        TOKENIZER,
        "Janus VQVAE (transformers)",
        _HF + "; alone or within a Janus",
        _read_janus,
        lambda config: vqgan.table(config, vqgan.JANUS),
        lambda config, layout: vqgan.janus_about(config),
        lambda config, about: vqgan.janus_config(_with_defaults(about, _JANUS)),
    ),
    "chameleon": Format(
        TOKENIZER,
        "Chameleon VQVAE (transformers), encoder",
        _HF + "; alone or within a Chameleon",
        _read_chameleon,
        lambda config: vqgan.table(config, vqgan.TAMING),
        lambda config, layout: vqgan.chameleon_about(config),
        lambda config, about: _parse_chameleon(about, config.decoder),
    ),
    "emu3": Format(
        TOKENIZER,
        "Emu3 VQVAE (transformers), images",
        _HF + "; alone or within an Emu3",
        _read_emu3,
        emu3.emu3_table,
        lambda config, layout: emu3.emu3_about(config),
        lambda config, about: emu3.emu3_config(_with_defaults(about, _EMU3)),
    ),
    "llamagen_vq": _styled(
        "LlamaGen VQ-16, VQ-8",
        "`.pt` or safetensors",
        _read_llamagen_vq,
        vqgan.LLAMAGEN,
        defaults={"quantize.codebook_used": Tensor(_UNUSED.shape, _UNUSED.dtype, _UNUSED.copy)},
    ),
    "maskgit_vqgan": _styled("MaskGIT-VQGAN (its PyTorch port)", "`.bin` or safetensors", _read_maskgit, vqgan.MASKGIT),
    "taming": _styled("VQGAN (taming-transformers)", "`.ckpt` or safetensors", _read_taming, vqgan.TAMING),
    "dalle_mini_vqgan": _styled(
        "dalle-mini's VQGAN f16-16384",
        "`flax_model.msgpack`",
        _read_dalle_mini,
        vqgan.DALLE_MINI,
        writes="`flax_model.msgpack`",
        write=write_msgpack,
    ),
    "imagegpt_clusters": Format(
        TOKENIZER,
        "ImageGPT's colour clusters",
        "`preprocessor_config.json` of its image processor",
        _read_clusters,
        _clusters_table,
        lambda config, layout: {"image_processor_type": "ImageGPTImageProcessor"},
        lambda config, about: PaletteConfig(num_codes=config.quantizer.num_codes),
        writes="`preprocessor_config.json`",
        write=write_clusters,
    ),
    "llama": Format(
        DECODER,
        "Llama (transformers)",
        _HF,
        _read_llama,
        gpt_tables.llama_table,
        lambda config, layout: gpt_tables.llama_about(config),
        lambda config, about: gpt_tables.llama_config(_with_defaults(about, _LLAMA)),
    ),
    "gpt2": Format(
        DECODER,
        "GPT-2 (transformers)",
        _HF,
        _read_gpt2,
        gpt_tables.gpt2_table,
        lambda config, layout: gpt_tables.gpt2_about(config),
        lambda config, about: gpt_tables.gpt2_config(_with_defaults(about, _GPT2)),
    ),
    "imagegpt": Format(
        DECODER,
        "ImageGPT (transformers)",
        _HF,
        _read_imagegpt,
        gpt_tables.gpt2_table,
        lambda config, layout: gpt_tables.gpt2_about(config),
        lambda config, about: gpt_tables.imagegpt_config(_with_defaults(about, _IMAGEGPT)),
    ),
    "llamagen": Format(
        DECODER,
        "LlamaGen B to 3B (classes), 1B and 7B (text)",
        "`.pt` or safetensors",
        _read_llamagen,
        llamagen.table,
        lambda config, layout: llamagen.model_args(config, layout.grid if layout else llamagen.GRID),
        lambda config, about: llamagen.as_published(config),
    ),
}
