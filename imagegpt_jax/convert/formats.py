"""Which published weights a path holds: recognised by content, never by the name of the file.

`FORMATS` is the matrix of what is read and written; each entry names the functions that the work is done by.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from imagegpt_jax import config as config_lib
from imagegpt_jax.convert import emu3, gpt_tables, llamagen, maskgit_flax, readers, vqgan
from imagegpt_jax.convert.core import Rule
from imagegpt_jax.convert.layout import RasterLayout
from imagegpt_jax.convert.networks import Config
from imagegpt_jax.convert.readers import Options, Published, Reader
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.models.palette import PaletteConfig
from imagegpt_jax.models.vq import VQConfig
from imagegpt_jax.weight_files.files import Source, Writer, write_clusters, write_folder, write_msgpack
from imagegpt_jax.weight_files.tensor import Tensor

TOKENIZER, DECODER = "tokenizer", "decoder"


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
    read: Reader
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
            f"{key}={value!r}"
            for key, value in ours.items()
            if not _HARMLESS.fullmatch(key) and _plain(value) != _plain(theirs[key])
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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _is(entry: Format, source: Source, options: Options) -> bool:
    """Whether a source is of a format, even if a value in it is not supported."""
    try:
        return entry.read(source, options) is not None
    except UserError:
        return True


class Unknown(UserError):
    """A source holds nothing that is known, or nothing of the kind that is asked for."""


def recognise(source: Source, kind: str, options: Options | None = None) -> Published:
    """Finds out what a source holds of a kind, TOKENIZER or DECODER: some folders hold both.

    Raises:
      Unknown: if it holds nothing that is known, or nothing of this kind.
      UserError: if what it holds has a value that is not supported.
    """
    options = options or Options()
    for entry in FORMATS.values():
        if entry.kind == kind and (loaded := entry.read(source, options)) is not None:
            return loaded
    other = [f.title for f in FORMATS.values() if f.kind != kind and _is(f, source, options)]
    known = "; ".join(f.title for f in FORMATS.values() if f.kind == kind)
    holds = f"holds a {other[0]}" if other else f"is of the model_type {source.config.get('model_type')!r}"
    raise Unknown(f"{source.path} {holds}, and no {kind} that is known here. Known: {known}.")


# ------------------------------------------------------------------------------------------------------------ matrix


def _no_about(config: Any, layout: RasterLayout | None) -> dict[str, Any]:
    return {}


def _styled(kind_title: str, where: str, read: Reader, style: vqgan.Style, **more: Any) -> Format:
    """A tokenizer without a config of its own."""

    def table(config: VQConfig) -> list[Rule]:
        return vqgan.table(config, style)

    def parse(config: Any, about: Mapping[str, Any]) -> Config:
        return vqgan.as_styled(config, style) if isinstance(config, VQConfig) else VQConfig()

    writes = more.pop("writes", "`model.safetensors`")
    return Format(TOKENIZER, kind_title, where, read, table, _no_about, parse, writes=writes, **more)


def _transformers(
    kind: str,
    title: str,
    read: Reader,
    table: Callable[[Any], list[Rule]],
    about: Callable[[Any], dict[str, Any]],
    parse: Callable[[Any, Mapping[str, Any]], Config],
    within: str = "",
    part: str = "",
) -> Format:
    """A class of `transformers`, saved alone or `within` a larger one; `part` of it is what is read."""
    where = "folder of `save_pretrained`: `config.json` and safetensors, in one file or shards"
    where += f"; alone or within {'an' if within[0] in 'AEIO' else 'a'} {within}" if within else ""
    title = f"{title} (transformers){part}"
    return Format(kind, title, where, read, table, lambda config, layout: about(config), parse)


def _decoder(title: str, read: Reader, table: Any, about: Any, parse: Callable[[Mapping[str, Any]], Config]) -> Format:
    """A decoder of `transformers`."""
    return _transformers(DECODER, title, read, table, about, lambda config, written: parse(written))


_UNUSED = np.zeros(65536, np.float32)  # LlamaGen counts use in a fixed number of slots
FORMATS: dict[str, Format] = {
    "janus": _transformers(
        TOKENIZER,
        "Janus VQVAE",
        readers.janus,
        lambda config: vqgan.table(config, vqgan.JANUS),
        vqgan.janus_about,
        lambda config, about: vqgan.janus_config(about),
        within="Janus",
    ),
    "chameleon": _transformers(
        TOKENIZER,
        "Chameleon VQVAE",
        readers.chameleon,
        lambda config: vqgan.table(config, vqgan.TAMING),
        vqgan.chameleon_about,
        lambda config, about: vqgan.chameleon_config(about, config.decoder),
        within="Chameleon",
        part=", encoder",
    ),
    "emu3": _transformers(
        TOKENIZER,
        "Emu3 VQVAE",
        readers.emu3_vqvae,
        emu3.emu3_table,
        emu3.emu3_about,
        lambda config, about: emu3.emu3_config(about),
        within="Emu3",
        part=", images",
    ),
    "llamagen_vq": _styled(
        "LlamaGen VQ-16, VQ-8",
        "`.pt` or safetensors",
        readers.llamagen_vq,
        vqgan.LLAMAGEN,
        defaults={"quantize.codebook_used": Tensor(_UNUSED.shape, _UNUSED.dtype, _UNUSED.copy)},
    ),
    "maskgit_vqgan": _styled(
        "MaskGIT-VQGAN (its PyTorch port)", "`.bin` or safetensors", readers.maskgit, vqgan.MASKGIT
    ),
    "maskgit_flax": Format(
        TOKENIZER,
        "MaskGIT-VQGAN (its authors' Flax)",
        "Flax's msgpack, such as `tokenizer_imagenet256_checkpoint`",
        readers.maskgit_original,
        maskgit_flax.table,
        _no_about,
        lambda config, about: vqgan.as_styled(config, vqgan.MASKGIT) if isinstance(config, VQConfig) else VQConfig(),
        writes="`flax_model.msgpack`",
        write=functools.partial(write_msgpack, under="params"),
    ),
    "taming": _styled("VQGAN (taming-transformers)", "`.ckpt` or safetensors", readers.taming, vqgan.TAMING),
    "dalle_mini_vqgan": _styled(
        "dalle-mini's VQGAN f16-16384",
        "`flax_model.msgpack`",
        readers.dalle_mini,
        vqgan.DALLE_MINI,
        writes="`flax_model.msgpack`",
        write=write_msgpack,
    ),
    "imagegpt_clusters": Format(
        TOKENIZER,
        "ImageGPT's colour clusters",
        "`preprocessor_config.json` of its image processor",
        readers.clusters,
        readers.clusters_table,
        lambda config, layout: {"image_processor_type": "ImageGPTImageProcessor"},
        lambda config, about: PaletteConfig(num_codes=config.quantizer.num_codes),
        writes="`preprocessor_config.json`",
        write=write_clusters,
    ),
    "llama": _decoder("Llama", readers.llama, gpt_tables.llama_table, gpt_tables.llama_about, gpt_tables.llama_config),
    "gpt2": _decoder("GPT-2", readers.gpt2, gpt_tables.gpt2_table, gpt_tables.gpt2_about, gpt_tables.gpt2_config),
    "imagegpt": _decoder(
        "ImageGPT", readers.imagegpt, gpt_tables.gpt2_table, gpt_tables.gpt2_about, gpt_tables.imagegpt_config
    ),
    "llamagen": Format(
        DECODER,
        "LlamaGen B to 3B (classes), 1B and 7B (text)",
        "`.pt` or safetensors",
        readers.llamagen_decoder,
        llamagen.table,
        lambda config, layout: llamagen.model_args(config, layout.grid if layout else llamagen.GRID),
        lambda config, about: llamagen.as_published(config),
    ),
}


def table() -> str:
    """What is read and written, for a terminal."""
    rows = [
        ("layout (--to)", "what", "reads"),
        *((name, f"{f.kind}: {f.title}", f.files) for name, f in FORMATS.items()),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows).replace("`", "")
