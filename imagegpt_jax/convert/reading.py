"""Weights -> what `inference.loading.load_tokenizer` and `inference.loading.load_decoder` hand out: published ones,
and portable folders.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imagegpt_jax import train_state
from imagegpt_jax.convert import core, formats, networks, portable
from imagegpt_jax.convert.formats import Options, Published
from imagegpt_jax.convert.layout import ImageSpace, RasterLayout
from imagegpt_jax.data import text as text_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.weight_files import files

# Codes are compared in float32 whatever the file keeps.
_CODEBOOK = "quantize.embedding"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Weights in memory.

    Attributes:
      config: of the network.
      network: its structure.
      params: its parameters, in the dtypes of the file.
      layout: how pictures become sequences, for published decoders of images.
      run: config of the run, for a network that was trained here; {} otherwise.
      text: folder of the text tokenizer; None without one.
    """

    config: networks.Config
    network: train_state.Network
    params: train_state.Params
    layout: RasterLayout | None = None
    run: Any = dataclasses.field(default_factory=dict)
    text: pathlib.Path | None = None

    def module(self) -> Any:
        """The network with its parameters."""
        return self.network.module(self.params)


def is_weights(path: Any) -> bool:
    """Whether a path holds weights, published or portable, and not a workdir of training."""
    return bool(path) and files.holds_weights(pathlib.Path(path).expanduser())


def describe(path: Any, kind: str) -> tuple[networks.Config, train_state.Network]:
    """Config and structure of the network of weights, without reading them; errors as in `load`."""
    local = pathlib.Path(path).expanduser()
    if local.is_dir() and portable.is_portable(local):
        config = _open(local, kind).config
    else:
        config = formats.recognise(files.open_source(local), kind).config
    return config, networks.network(config)


def _open(local: pathlib.Path, kind: str) -> portable.Portable:
    opened = portable.open_portable(local)
    if opened.kind != kind:
        raise UserError(f"{local} holds a {opened.kind}, not a {kind}.")
    return opened


def load(path: Any, kind: str, options: Options | None = None) -> Loaded:
    """Reads weights, a file or folder, of a "tokenizer" or "decoder"; `options` are what published ones do not tell.

    Raises:
      UserError: if they are not known, damaged, or do not fit the network that they describe.
    """
    local = pathlib.Path(path).expanduser()
    if local.is_dir() and portable.is_portable(local):
        opened = _open(local, kind)
        net, params = opened.params(_dtype_to_keep)
        run = ConfigDict(opened.run) if opened.run else {}
        return Loaded(opened.config, net, params, opened.layout, run, _text_folder(local))
    published = formats.recognise(files.open_source(local), kind, options or Options())
    return read(published, str(path), _text_folder(local) if kind == formats.DECODER else None)


def load_for(path: Any, kind: str, network: train_state.Network) -> train_state.Params:
    """Parameters of weights in the dtypes that a network is built with; errors as in `load`."""
    abstract = train_state.split(network.abstract)[1]

    def cast(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        # On the host: under the mesh of a training JAX computes nothing on one of its devices alone.
        return x if x.dtype == like.dtype else jax.device_put(np.asarray(x).astype(like.dtype), x.sharding)

    return jax.tree.map(cast, load(path, kind).params, abstract)


def _text_folder(local: pathlib.Path) -> pathlib.Path | None:
    """Folder of the text tokenizer that lies with weights; None without one."""
    folder = local if local.is_dir() else local.parent
    if (folder / "text_tokenizer").is_dir():
        return folder / "text_tokenizer"
    return folder if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")) else None


def text_tokenizer(path: Any) -> text_lib.TextTokenizer:
    """The text tokenizer that lies with weights; raises UserError if there is none."""
    folder = _text_folder(pathlib.Path(path).expanduser())
    if folder is None:
        raise UserError(f"{path} comes without a text tokenizer: put its tokenizer.json beside the weights.")
    return text_lib.load_tokenizer(folder)


def read(published: Published, what: str, text: pathlib.Path | None = None) -> Loaded:
    """Reads the arrays of recognised weights; `what` names them in errors."""
    net = networks.network(published.config)
    stream = core.convert(published.table, published.tensors, networks.shapes(net), what)
    arrays = ((name, array) for name, array in stream if not name.startswith(core.CARRIED))
    params = networks.assemble(net, arrays, _dtype_to_keep)
    return Loaded(published.config, net, params, published.layout, text=text)


def _dtype_to_keep(name: str, dtype: np.dtype) -> np.dtype:
    return np.promote_types(dtype, np.float32) if name == _CODEBOOK else jax.dtypes.canonicalize_dtype(dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class DecoderSetup:
    """Stands for a decoder's `tasks.decoder.Setup` where it was not trained here.

    Attributes:
      model: the network's config.
      layout: how pictures become sequences; None for a language model.
      folder: where it came from.
      tokenizer: the image tokenizer to draw with; "" = what lies beside the weights.
      text_folder: its text tokenizer; None without one.
      encoder: the `tasks.decoder.text_encoder.TextEncoder` that reads its prompts; None without one.
    """

    model: Any
    layout: RasterLayout | None
    folder: str
    tokenizer: str
    text_folder: pathlib.Path | None
    encoder: Any = None

    @property
    def space(self) -> Any:
        """The ids."""
        if self.layout is not None:
            return self.layout.space
        return ImageSpace(num_codes=0, vocab_size=self.model.vocab_size)

    @functools.cached_property
    def text(self) -> text_lib.TextTokenizer:
        """The text tokenizer; raises UserError if there is none."""
        if self.text_folder is None:
            raise UserError(f"{self.folder} comes without a text tokenizer: encode prompts to ids yourself.")
        return text_lib.load_tokenizer(self.text_folder)

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of classes, from a `labels.json` beside the weights."""
        path = pathlib.Path(self.folder) / "labels.json"
        return tuple(json.loads(path.read_text())) if path.is_file() else ()

    @functools.cached_property
    def config(self) -> Any:
        """What `api` reads of a run's config: no data, no tokenizer, plain sampling."""
        classes = self.space.num_classes if self.layout is not None else 0
        return ConfigDict(
            {
                "task": "decoder",
                "tokenizer": self.tokenizer or self.folder,
                "model": dataclasses.asdict(self.model),
                "data": {"text_length": 0 if self.encoder is None else self.encoder.length, "use_labels": classes > 0},
                "sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_scale": 1.0},
            }
        )

    def positions(self, length: int) -> np.ndarray | None:
        """Positions [length, 3] of a plain sequence, None for (i, i, i); raises UserError if there are too few."""
        if self.model.position == "learned" and length > self.model.max_length:
            raise UserError(f"{length} tokens are more than the {self.model.max_length} positions of these weights.")
        return self.layout.positions(length) if self.layout is not None and self.layout.by_row else None
