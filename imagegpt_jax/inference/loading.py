"""Loads what a path holds: a tokenizer, a decoder, or the network of a user's own task."""

import dataclasses
from typing import Any

from etils import epath

from imagegpt_jax import config as config_lib
from imagegpt_jax.convert import formats, reading
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import runs
from imagegpt_jax.inference.decoder import Decoder, load_decoder
from imagegpt_jax.inference.tokenizer import Tokenizer, load_tokenizer
from imagegpt_jax.tasks import interface


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """The network of a run whose task has a kind of its own.

    Attributes:
      kind: what the task says it is.
      module: the network, an `nnx.Module`.
      config: the run's config.
      path: its workdir.
      step: its checkpoint.
    """

    kind: str
    module: Any
    config: Any
    path: str
    step: int

    def __repr__(self) -> str:
        return f"LoadedModel(kind={self.kind!r}, path={self.path!r}, step={self.step})"


def kind_of(path: epath.PathLike) -> str:
    """What a path holds: "tokenizer", "decoder", or the kind that a user's own task says.

    Raises UserError if it holds neither a run nor weights that are known, or both kinds of weights.
    """
    config: Any = config_lib.load(path)
    if not reading.is_weights(path):
        return interface.find(config.task).kind
    problems: list[str] = []
    for kind in (formats.TOKENIZER, formats.DECODER):
        try:
            reading.describe(path, kind)
        except UserError as e:
            problems.append(str(e))
        else:
            return kind
    raise UserError(problems[0])


def load(path: epath.PathLike, step: int | None = None) -> Tokenizer | Decoder | LoadedModel:
    """Loads what a workdir, a portable folder or published weights hold, by their kind.

    Args:
      path: workdir of a training run; or weights, as for `load_tokenizer` and `load_decoder`, which take options.
      step: checkpoint of a run; the newest by default.

    Raises:
      UserError: if there is nothing that can be loaded.
    """
    kind = kind_of(path)
    if kind == formats.TOKENIZER:
        return load_tokenizer(path, step)
    if kind == formats.DECODER:
        return load_decoder(path, step)
    run = runs.read(path, kind, step)
    return LoadedModel(kind, run.module(), run.setup.config, str(path), run.step)
