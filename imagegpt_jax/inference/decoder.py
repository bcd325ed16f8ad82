"""A loaded decoder with what belongs to it: text tokenizer, class names, layout of sequences.

Shapes: B batch, L sequence, P places for features, E their width, V vocabulary.
"""

import dataclasses
import weakref
from collections.abc import Sequence as List
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from imagegpt_jax.convert import reading
from imagegpt_jax.convert.formats import Options
from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.inference import runs
from imagegpt_jax.inference.tokenizer import Images, Tokenizer, fingerprint, load_tokenizer
from imagegpt_jax.models.gpt import GPT, Output, Sequence, plain_sequence
from imagegpt_jax.sampling import settings as settings_lib
from imagegpt_jax.sampling.batching import place
from imagegpt_jax.sampling.settings import Sampling
from imagegpt_jax.tasks import interface
from imagegpt_jax.tasks.decoder import text_encoder as encoders
from imagegpt_jax.tasks.decoder.setup import Setup, tokenizer_params, trained_tokenizer


class Decoder(nnx.Module):
    """A trained decoder with what belongs to it. Made by `load_decoder`.

    Attributes:
      gpt: the network.
      setup: static part of its run: config, text tokenizer, class names, layout of sequences.
      path: workdir it was loaded from.
      step: its checkpoint.
    """

    def __init__(self, gpt: GPT, setup: Setup, *, path: str, step: int):
        self.gpt = gpt
        self.setup = setup
        self.path, self.step = path, step

    def placed(self, weights: str = "", mesh: jax.sharding.Mesh | None = None) -> GPT:
        """The network as decoding wants it (`sampling.batching.place`), made once for each precision of the weights and
        mesh.
        """
        kept, leaves = _PLACED.setdefault(self, {}), jax.tree.leaves(self.gpt)
        made_of, placed = kept.get((weights, mesh), ((), self.gpt))
        if len(made_of) != len(leaves) or any(a is not b for a, b in zip(made_of, leaves, strict=True)):
            placed = place(self.gpt, weights, mesh)
            kept[weights, mesh] = leaves, placed
        return placed

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.gpt)))
        return f"Decoder({self.path!r}, step={self.step}, parameters={count:,})"

    @property
    def config(self) -> Any:
        """The run's config, an `ml_collections.ConfigDict`."""
        return self.setup.config

    def __call__(self, sequence: Sequence, *, key: jax.Array | None = None) -> Output:
        """Runs the network on sequences, see `models.gpt.GPT`."""
        return self.gpt(sequence, key=key)

    def logits(self, ids_BL: Images, features: tuple[Images, Images] | None = None) -> jax.Array:
        """Next-token logits of plain ids, float32 [B, L, V]: token i is at position (i, i, i), all of one segment.

        A published decoder of images on a grid has the first id before the picture, the others at their places in it.

        Args:
          ids_BL: integers, from the first token on.
          features: a text encoder's output [B, P, E] and its mask [B, P], for a decoder with `feature_width`.

        Raises:
          UserError: for ids that are not integers [B, L] in the token space, or more than it has positions for.
        """
        ids = np.asarray(ids_BL)
        size = self.setup.space.vocab_size
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= size:
            raise UserError(f"ids are integers [B, L] from 0 to {size - 1}; these are {ids.dtype} {ids.shape}.")
        sequence = plain_sequence(jnp.asarray(ids, jnp.int32))
        if isinstance(self.setup, reading.DecoderSetup):
            positions_L3 = self.setup.positions(ids.shape[1])
            if positions_L3 is not None:
                positions_BL3 = jnp.broadcast_to(positions_L3, (*ids.shape, 3))
                sequence = dataclasses.replace(sequence, positions=positions_BL3)
        if features is not None:
            values_BPE, mask_BP = (jnp.asarray(x) for x in features)
            sequence = dataclasses.replace(sequence, features=values_BPE, feature_mask=mask_BP.astype(bool))
        return _logits(self.gpt, sequence)

    def text_features(self, prompts: List[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Final states of a language model over prompts, as prefix features of another decoder.

        Args:
          prompts: texts; an empty one has no features.
          length: P, features of each prompt; of longer prompts the first are kept.

        Returns:
          float32 [B, P, E] and bool [B, P]: features and which of them are real, at the end of each row, so that the
          last one stands right before the picture.

        Raises:
          UserError: if the weights came without a text tokenizer.
        """
        return encoders.read(self.gpt, self.setup.text, prompts, length)

    def read(self, prompts: List[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """What the decoder's text encoder makes of prompts, as `text_features`; None if it has none."""
        return None if self.setup.encoder is None else self.setup.encoder.read(prompts)

    def sampling(self, **settings: float | str | None) -> Sampling:
        """The run's `config.sampling`, with the settings that are given (not None) in place of its own.

        Raises:
          UserError: for a setting that is out of range.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        return settings_lib.read({**self.config.sampling.to_dict(), **given})

    def class_index(self, label: int | str) -> int:
        """Number of a class that is given by name (case and underscores do not matter) or number.

        Raises:
          UserError: if there is no such class.
        """
        names, count = self.setup.labels, self.setup.space.num_classes
        if not count:
            raise UserError(f"{self.path} was not trained on classes: give prompts.")
        wanted = _plain(str(label))
        matches = [i for i, name in enumerate(names) if _plain(name) == wanted]
        if matches:
            return matches[0]
        if wanted.isdecimal() and int(wanted) < count:
            return int(wanted)
        raise UserError(f"unknown class {label!r}: classes are 0 to {count - 1}, or names.{suggest(str(label), names)}")

    def fingerprint(self) -> str:
        """Identifies architecture and parameters, a text encoder's too: 16 hexadecimal digits; a second a gigabyte."""
        encoder = self.setup.encoder
        about = self.gpt.config if encoder is None else (self.gpt.config, fingerprint(encoder.model, encoder.params()))
        return fingerprint(about, self.gpt)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a prompt, of which the first `setup.layout.text_length` are used; none with a text encoder.

        Raises:
          UserError: for a prompt that is not empty, if the decoder was not trained on captions.
        """
        data = self.config.data
        if text and data.text_length <= int(data.use_labels):
            raise UserError(f"{self.path} was trained on classes, not on captions: give classes.")
        return self.setup.text.encode_batch([text])[0] if text and self.setup.encoder is None else []

    def load_tokenizer(self) -> Tokenizer:
        """The image tokenizer that the decoder was trained with.

        Raises:
          UserError: if it is not where the decoder's config says, or the config names none.
        """
        if not self.config.tokenizer:
            raise UserError(
                f"{self.path} was trained on token shards alone, without a tokenizer: name the one that made them,"
                " by --tokenizer=WORKDIR or load_decoder(..., tokenizer=WORKDIR)."
            )
        if source := trained_tokenizer(self.config):
            return load_tokenizer(source)
        return Tokenizer(self.setup.tokenizer, tokenizer_params(self.setup), path="", step=0)


# What `Decoder.placed` made, and of which parameters; outside the module, whose copies have parameters of their own.
_PLACED: weakref.WeakKeyDictionary[Decoder, dict[Any, tuple[list[jax.Array], GPT]]] = weakref.WeakKeyDictionary()


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


@jax.jit
def _logits(gpt: GPT, sequence: Sequence) -> jax.Array:
    return gpt(sequence).logits


def load_decoder(
    path: epath.PathLike,
    step: int | None = None,
    *,
    tokenizer: epath.PathLike | None = None,
    text_encoder: epath.PathLike | None = None,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
) -> Decoder:
    """Loads a decoder.

    Args:
      path: workdir of its training run; or weights: a portable folder, or the file or folder of a published system,
        recognised by content (docs/weights.md).
      step: checkpoint of a run; the newest by default.
      tokenizer: workdir of its image tokenizer, if that is no longer where the decoder's config says.
      text_encoder: language model that reads the prompts, if it is no longer where the decoder's config says, or for
        a published decoder that reads features.
      heads: of a LlamaGen decoder of unpublished size, which its weights do not tell.
      grid: (rows, columns) of codes of a LlamaGen decoder's pictures, if they are not 16 x 16.

    Raises:
      UserError: if there is no such run, checkpoint or decoder.
    """
    named = {"tokenizer": tokenizer, "text_encoder": text_encoder}
    changes = {key: str(value) for key, value in named.items() if value is not None}
    if not reading.is_weights(path):
        run = runs.read(path, "decoder", step, changes)
        return Decoder(run.module(), run.setup, path=str(path), step=run.step)
    loaded = reading.load(path, "decoder", Options(heads=heads, grid=grid))
    if loaded.run:
        loaded.run.update(changes)
        setup: Any = interface.find(loaded.run.task).setup_for_inference(loaded.run, path)
    else:
        model: Any = loaded.config
        encoder = None
        if text_encoder is not None:
            encoder = encoders.open_encoder(text_encoder, model.feature_length, model.feature_width, model.dtype)
        setup = reading.DecoderSetup(model, loaded.layout, str(path), str(tokenizer or ""), loaded.text, encoder)
    return Decoder(loaded.module(), setup, path=str(path), step=0)
