"""A frozen language model that reads the prompt: its final states are prefix features of a decoder ("the GPT encodes
the prompt"; LlamaGen's text-conditional decoders read a T5's the same way, arXiv:2406.06525, section 2.4).

Features stand at the end of their P places, so that the last word is right before the picture. A prompt without words
has none: the decoder puts its learned ones there.

Shapes: B prompts, P places for features, E width of the language model.
"""

import dataclasses
import functools
from collections.abc import Sequence as List
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imagegpt_jax import train_state
from imagegpt_jax.convert import networks, reading
from imagegpt_jax.data.text import TextTokenizer
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt import GPT, Sequence
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.parallel import padding, sharding

TILE = 16  # prompts that are read at once: the same for any number, so that none depends on the others


def place(ids: List[List[int]], length: int) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Ids of prompts at the end of `length` places, and where they stand; of longer prompts the first are kept."""
    rows = [list(row[:length]) for row in ids]
    mask_BP = np.arange(length) >= length - np.array([[len(row)] for row in rows])
    tokens_BP = np.zeros(mask_BP.shape, np.int32)
    tokens_BP[mask_BP] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return tokens_BP, mask_BP


def states(gpt: GPT, tokens_BP: Int[Array, "B P"], mask_BP: Bool[Array, "B P"]) -> Float[Array, "B P E"]:
    """Final states of a language model over prompts as `place` puts them; zero where there is no word. Pure."""
    positions_BP = jnp.where(mask_BP, jnp.cumsum(mask_BP, axis=1) - 1, 0).astype(jnp.int32)
    positions_BP3 = jnp.broadcast_to(positions_BP[..., None], (*mask_BP.shape, 3))
    hidden_BPE = gpt(Sequence(tokens_BP, positions_BP3, mask_BP.astype(jnp.int32))).hidden
    return jnp.where(mask_BP[..., None], hidden_BPE, 0)


_states = jax.jit(states)


def read(
    gpt: GPT, text: TextTokenizer, prompts: List[str], length: int
) -> tuple[Float[np.ndarray, "B P E"], Bool[np.ndarray, "B P"]]:
    """Features of prompts and which of them are real, TILE prompts at a time."""
    tokens_BP, mask_BP = place(text.encode_batch(list(prompts)), length)
    states_BPE = padding.map_batches(functools.partial(_states, gpt), TILE, tokens_BP, mask_BP)
    return states_BPE.astype(np.float32), mask_BP


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """A language model as a decoder's text encoder; its weights are read when they are asked for.

    Attributes:
      folder: its weights, see docs/weights.md.
      length: P, features of a prompt.
      model: its config.
      network: its structure.
      text: its text tokenizer.
    """

    folder: str
    length: int
    model: GPTConfig
    network: train_state.Network
    text: TextTokenizer

    def params(self) -> train_state.Params:
        """Its parameters, in the dtypes that the network is built with."""
        return reading.load_for(self.folder, "decoder", self.network)

    @functools.cached_property
    def _module(self) -> Any:
        return self.network.module(self.params())

    def read(self, prompts: List[str]) -> tuple[Float[np.ndarray, "B P E"], Bool[np.ndarray, "B P"]]:
        """Features of prompts and which of them are real, computed on this process's first device."""
        mesh = sharding.local_mesh(jax.local_devices()[:1])
        with jax.set_mesh(mesh):  # the caller may be at work on a mesh of all processes' devices
            return read(self._module, self.text, prompts, self.length)

    def place(self, prompts: List[str]) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
        """Ids of prompts and where they stand, for `states`."""
        return place(self.text.encode_batch(list(prompts)), self.length)


def open_encoder(folder: Any, length: int, width: int = 0, dtype: str = "float32") -> TextEncoder:
    """Opens a language model as a text encoder, without reading its weights.

    Args:
      folder: of weights.
      length: P.
      width: E that the decoder asks for; 0 = any.
      dtype: that the decoder computes in; the encoder computes in its own, but in float64 beside a decoder in float64.

    Raises:
      UserError: if there is no language model with a text tokenizer, it is of another width or too short, or the
        decoder has no places for features.
    """
    if length < 1:
        raise UserError(f"text_encoder={folder} is for decoders with places for features, and this one has none.")
    if not reading.is_weights(folder):
        raise UserError(
            f"text_encoder={folder} holds no weights: give the folder of a language model, such as a GPT-2 or Llama of"
            " transformers, or a portable one (docs/weights.md)."
        )
    model, network = reading.describe(folder, "decoder")
    if not isinstance(model, GPTConfig) or model.conditioning != "prefix" or model.feature_width:
        raise UserError(f"text_encoder={folder} holds a decoder that does not read words alone: give a language model.")
    if model.position == "learned" and model.max_length < length:
        raise UserError(
            f"text_encoder={folder} knows {model.max_length} positions, and prompts have {length}: lower"
            " data.text_length or model.feature_length."
        )
    if width not in (0, model.width):
        raise UserError(
            f"text_encoder={folder} has states of {model.width} numbers, and the decoder reads features of {width}: set"
            f" --config.model.feature_width={model.width}, or 0 to take what the encoder has."
        )
    if dtype == "float64":
        model = dataclasses.replace(model, dtype=dtype)
        network = networks.network(model)
    return TextEncoder(str(folder), length, model, network, reading.text_tokenizer(folder))
