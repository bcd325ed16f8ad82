"""What a notebook uses: load a trained tokenizer or decoder from its workdir, encode, decode, generate.

Everything runs in tiles of a fixed number of rows per device, the last one padded, so that what happens to an image
does not depend on what else is in the call.

Shapes: B batch, H W C image, h w code grid, L = h * w codes in raster order, V vocabulary.
"""

import dataclasses
import functools
import hashlib
import math
import weakref
from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax import config as config_lib
from imagegpt_jax.convert import reading
from imagegpt_jax.convert.formats import Options
from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.inference import text_encoder as encoders
from imagegpt_jax.models.gpt import GPT, Output, Sequence, plain_sequence
from imagegpt_jax.parallel import padding, sharding
from imagegpt_jax.sampling import settings as settings_lib
from imagegpt_jax.sampling.batching import place
from imagegpt_jax.sampling.settings import Sampling
from imagegpt_jax.tasks import decoder as decoder_task
from imagegpt_jax.tasks import tokenizer as tokenizer_task

TILE_ROWS = 8  # images of a tile on each device

Images = np.ndarray | jax.Array


def read_config(path: epath.PathLike, task: str) -> Any:
    """The config of a workdir, which must be one of this task ("tokenizer" or "decoder").

    Raises:
      UserError: if the folder is no workdir, or one of the other task.
    """
    config: Any = config_lib.load(path)
    if config.task != task:
        raise UserError(f"{path} holds a {config.task}, not a {task}: give the --workdir of a {task}'s training run.")
    return config


# --------------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """An image tokenizer: images to codes and back. Made by `load_tokenizer`.

    Attributes:
      config: its model's config (`models.vq.VQConfig`).
      path: workdir it was loaded from; "" for an untrained one.
      step: its checkpoint; 0 for an untrained one.
      downsample: pixels per code along each side.
      num_codes: number of different codes.
      tile: images that run at once.
    """

    def __init__(
        self, setup: tokenizer_task.Setup, params: train_state.Params, *, path: str, step: int, rows: int = TILE_ROWS
    ):
        """Puts the parameters onto every device of this process.

        Args:
          setup: static part of the tokenizer's run.
          params: parameters of its "generator".
          path: workdir.
          step: checkpoint.
          rows: images that each device runs at once.
        """
        self._mesh = mesh = sharding.local_mesh()
        self.config = setup.model
        self.path, self.step = path, step
        self.downsample, self.num_codes = self.config.downsample, self.config.quantizer.num_ids
        self.tile = rows * mesh.size
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._sharding = sharding.batch_sharding(mesh)
        predict = tokenizer_task.predict_fns(setup)
        self._encode, self._decode = jax.jit(predict["encode"]), jax.jit(predict["decode"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies architecture and parameters: 16 hexadecimal digits of a SHA-256."""
        return _fingerprint(self.config, self._params)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the codes of an image; where a vector has several codes, they stand beside each other."""
        per_vector = self.config.quantizer.codes_per_vector
        return height // self.downsample, width // self.downsample * per_vector

    def encode(self, images_BHWC: Images) -> np.ndarray:
        """Images to codes.

        Args:
          images_BHWC: uint8, or float in [-1, 1]; height and width are multiples of `downsample`.

        Returns:
          int32 [B, L], the codes in raster order.

        Raises:
          UserError: for images of another shape, type or range.
        """
        images = np.asarray(images_BHWC)
        if images.ndim != 4 or not len(images):
            raise UserError(f"images are [B, H, W, C] with B >= 1, and these have the shape {images.shape}.")
        if images.dtype == np.uint8:
            images = images.astype(np.float32) * np.float32(2 / 255) - np.float32(1)
        elif images.dtype.kind != "f" and images.dtype != jnp.bfloat16:
            raise UserError(f"images are uint8, or float in [-1, 1], and these are {images.dtype}.")
        elif not (np.min(images) >= -1.001 and np.max(images) <= 1.001):
            raise UserError(
                f"float images lie in [-1, 1], and these in [{np.min(images):g}, {np.max(images):g}]: give uint8, or"
                " divide by 127.5 and subtract 1."
            )
        codes_Bhw = self._in_tiles(self._encode, images.astype(np.float32))
        return codes_Bhw.reshape(len(codes_Bhw), -1)

    def decode(self, codes_BL: Images, grid: tuple[int, int] | None = None) -> np.ndarray:
        """Codes to images.

        Args:
          codes_BL: integers in [0, num_codes), raster order.
          grid: (rows, columns) of the codes; square by default.

        Returns:
          float32 [B, H, W, C] in [-1, 1].

        Raises:
          UserError: for codes outside the codebook, or that do not fill the grid.
        """
        codes = np.asarray(codes_BL)
        if codes.ndim != 2 or not codes.size or codes.dtype.kind not in "iu":
            raise UserError(f"codes are integers [B, L], and these are {codes.dtype} of shape {codes.shape}.")
        side = math.isqrt(codes.shape[1] // self.config.quantizer.codes_per_vector)
        rows, columns = grid or (side, side * self.config.quantizer.codes_per_vector)
        if rows * columns != codes.shape[1]:
            given = f"the grid {rows} x {columns}" if grid else "a square: give grid=(rows, columns)"
            raise UserError(f"{codes.shape[1]} codes do not fill {given}.")
        if codes.min() < 0 or codes.max() >= self.num_codes:
            raise UserError(f"codes lie in 0 to {self.num_codes - 1}, and these in {codes.min()} to {codes.max()}.")
        images_BHWC = self._in_tiles(self._decode, codes.astype(np.int32).reshape(-1, rows, columns))
        return np.clip(images_BHWC, -1, 1)

    def _in_tiles(self, fn: Callable[..., jax.Array], inputs: np.ndarray) -> np.ndarray:
        with jax.set_mesh(self._mesh):  # the caller may be at work on a mesh of all processes' devices
            return padding.map_batches(
                lambda rows: fn(self._params, jax.device_put(rows, self._sharding)), self.tile, inputs
            )


def _fingerprint(config: Any, params: Any) -> str:
    digest = hashlib.sha256(repr(config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def read_tokenizer(
    path: epath.PathLike, step: int | None = None
) -> tuple[tokenizer_task.Setup, train_state.Params, int]:
    """Static part, parameters and step of an image tokenizer; errors as in `load_tokenizer`."""
    if reading.is_weights(path):
        loaded = reading.load(path, "tokenizer")
        return tokenizer_task.setup_for_weights(loaded.config, loaded.network), loaded.params, 0
    setup = tokenizer_task.setup_for_inference(read_config(path, "tokenizer"), path)
    step = checkpoint.choose_step(path, step)
    abstract = train_state.abstract(tokenizer_task.init_state, setup)
    return setup, checkpoint.load_params(path, abstract, "generator", step), step


def load_tokenizer(path: epath.PathLike, step: int | None = None, *, rows: int = TILE_ROWS) -> Tokenizer:
    """Loads an image tokenizer.

    Args:
      path: workdir of its training run; or weights: a portable folder, or the file or folder of a published system,
        recognised by content (docs/weights.md).
      step: checkpoint of a run; the newest by default.
      rows: images that each device runs at once.

    Raises:
      UserError: if there is no such run, checkpoint or tokenizer.
    """
    setup, params, step = read_tokenizer(path, step)
    return Tokenizer(setup, params, path=str(path), step=step, rows=rows)


# ----------------------------------------------------------------------------------------------------------- decoder


class Decoder(nnx.Module):
    """A trained decoder with what belongs to it. Made by `load_decoder`.

    Attributes:
      gpt: the network.
      setup: static part of its run: config, text tokenizer, class names, layout of sequences.
      path: workdir it was loaded from.
      step: its checkpoint.
    """

    def __init__(self, gpt: GPT, setup: decoder_task.Setup, *, path: str, step: int):
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
        about = self.gpt.config if encoder is None else (self.gpt.config, _fingerprint(encoder.model, encoder.params()))
        return _fingerprint(about, self.gpt)

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
          UserError: if it is not where the decoder's config says.
        """
        if self.config.tokenizer:
            return load_tokenizer(self.config.tokenizer)
        params = decoder_task.tokenizer_params(self.setup)
        return Tokenizer(self.setup.tokenizer, params, path="", step=0)


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
    loaded = None
    if reading.is_weights(path):
        loaded = reading.load(path, "decoder", Options(heads=heads, grid=grid))
        if not loaded.run:
            model: Any = loaded.config
            beside, encoder = str(tokenizer or ""), None
            if text_encoder is not None:
                encoder = encoders.open_encoder(text_encoder, model.feature_length, model.feature_width, model.dtype)
            setup: Any = reading.DecoderSetup(model, loaded.layout, str(path), beside, loaded.text, encoder)
            return Decoder(loaded.module(), setup, path=str(path), step=0)
    config = read_config(path, "decoder") if loaded is None else loaded.run
    if tokenizer is not None:
        config.tokenizer = str(tokenizer)
    if text_encoder is not None:
        config.text_encoder = str(text_encoder)
    setup = decoder_task.setup_for_inference(config, path)
    if loaded is not None:
        return Decoder(loaded.module(), setup, path=str(path), step=0)
    step = checkpoint.choose_step(path, step)
    abstract = train_state.abstract(decoder_task.init_state, setup)
    params = checkpoint.load_params(path, abstract, "decoder", step)
    network: Any = setup.networks["decoder"].module(params)
    return Decoder(network, setup, path=str(path), step=step)
