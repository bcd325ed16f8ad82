"""What a decoder trains on: packed sequences, and where in them the targets of each kind are.

Shapes: B batch, L sequence, N image codes, M places of one kind.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagegpt_jax import train_state
from imagegpt_jax.data import order, packing
from imagegpt_jax.errors import UserError
from imagegpt_jax.tasks import input as splits
from imagegpt_jax.tasks.decoder import text_encoder
from imagegpt_jax.tasks.decoder.setup import Setup
from imagegpt_jax.train_state import TrainState

# Keep the draws of guidance dropout, direction and order apart from each other and from the pipeline's.
_DROP, _DIRECTION, _RANDOM, _ORDER = 1 << 42, 1 << 43, 1 << 44, 1 << 45
# Rows that an accelerator's kernels work on at once.
TILE = 128


def batches(setup: Setup, split: str, **where: Any) -> Any:
    """Packed batches of a split, see `splits.batches`."""
    return splits.batches(setup, split, host_fn=functools.partial(pack, setup, train=split == "train"), **where)


def abstract_batch(setup: Setup, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `batches` gives and the devices see."""
    packed = setup.layout.pack(None, None, np.zeros((1, setup.layout.num_codes), np.int32))
    packed["position"] = np.zeros(1, np.int64)
    model = setup.model
    if setup.encoder is not None:
        packed |= _prompts(setup, [""])
    elif model.feature_width:
        packed["features"] = np.zeros((1, model.feature_length, model.feature_width), np.float32)
        packed["feature_mask"] = np.zeros((1, model.feature_length), bool)
    if "tokenizer" in setup.networks:
        (rows, columns), tokenizer = setup.layout.grid, setup.tokenizer.model
        sides = rows * tokenizer.downsample, columns // tokenizer.quantizer.codes_per_vector * tokenizer.downsample
        packed["image"] = np.zeros((1, *sides, tokenizer.in_channels), np.float32)
        if setup.config.data.order.raster_from:
            packed["order"] = np.zeros((1, rows * columns), np.int32)
    return {name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for name, x in packed.items()}


def pack(setup: Setup, batch: dict[str, np.ndarray], *, train: bool) -> dict[str, np.ndarray]:
    """Captions, labels and codes -> sequences. Guidance dropout and direction of an example depend on its position.

    Where the batch holds images, the places of their codes are filled in by `prepare_batch`.
    """
    data, positions_B = setup.config.data, batch["position"]
    captions = [str(caption) for caption in batch.get("caption", [""] * len(positions_B))]
    texts = setup.text.encode_batch(captions) if "caption" in batch else None
    codes_BN = batch.get("codes")
    if codes_BN is None:
        codes_BN = np.zeros((len(positions_B), setup.layout.num_codes), np.int32)
    orders_BN = orders(setup, positions_B) if train else None
    dropped_B = _draws(setup, positions_B, _DROP) < data.guidance_dropout if train else None
    turned_B = _draws(setup, positions_B, _DIRECTION) < data.image_to_text if train else None
    packed = setup.layout.pack(
        texts if setup.layout.text_length else None,
        batch["label"] if data.use_labels else None,
        codes_BN,
        None if turned_B is None else turned_B * packing.IMAGE_TO_TEXT,
        dropped_B,
        orders_BN,
    )
    if setup.encoder is not None:
        packed |= _prompts(setup, captions if dropped_B is None else np.where(dropped_B, "", captions).tolist())
    keep = {name: batch[name] for name in ("image", "mask", "position") if name in batch}
    if orders_BN is not None and "image" in batch:
        keep["order"] = orders_BN  # the codes are not there yet
    return packed | keep


# What the text encoder reads: ids and where they stand, see `text_encoder.place`.
PROMPTS = ("prompt_tokens", "prompt_mask")


def _prompts(setup: Setup, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """What the text encoder is to read of a batch."""
    assert setup.encoder is not None
    return dict(zip(PROMPTS, setup.encoder.place(captions), strict=True))


def _draws(setup: Setup, positions_B: np.ndarray, use: int) -> np.ndarray:
    """A random number from 0 to 1 for the example at each position."""
    return order.hash_positions(positions_B, setup.config.seed, use) / 2.0**64


def random_share(setup: Setup, positions_B: np.ndarray) -> np.ndarray:
    """Share of sequences in random order among the examples at these positions of the run (arXiv:2411.00776, eq. 5).

    One until step `data.order.random_until`, from there falling linearly to zero at `data.order.raster_from`.
    """
    annealing, step_B = setup.config.data.order, positions_B // setup.config.batch_size
    length = max(annealing.raster_from - annealing.random_until, 1)
    return np.clip((annealing.raster_from - step_B) / length, 0.0, 1.0)


def orders(setup: Setup, positions_B: np.ndarray) -> np.ndarray | None:
    """int32 [B, N]: the order of each sequence's codes, a function of its position; None if all are in raster order."""
    if not setup.config.data.order.raster_from:
        return None
    count = setup.layout.num_codes
    places_BN = positions_B[:, None] * count + np.arange(count)
    shuffled_BN = np.argsort(order.hash_positions(places_BN, setup.config.seed, _ORDER), axis=1)
    random_B = _draws(setup, positions_B, _RANDOM) < random_share(setup, positions_B)
    return np.where(random_B[:, None], shuffled_BN, np.arange(count)).astype(np.int32)


def used_length(setup: Setup) -> int:
    """How many tokens of a sequence go through the blocks.

    Nothing is predicted from the last code and the end of a picture: they are left out where that saves a tile of 128.
    """
    layout = setup.layout
    used = layout.text_length + layout.num_codes
    if setup.config.data.image_to_text or -(-used // TILE) == -(-layout.length // TILE):
        return layout.length
    return used


def target_parts(setup: Setup, tokens_BL: jax.Array) -> list[tuple[int, int | jax.Array, int, tuple[int, int]]]:
    """Where the targets of each kind are: (kind, first place of each sequence, number of places, ids it can have).

    Where no sequence of the run is turned around, the first place is a plain number, and no gather is needed.
    """
    layout = setup.layout
    image, text = (layout.text_length, 0) if not setup.config.data.image_to_text else _starts(layout, tokens_BL)
    parts = [(packing.IMAGE, image, layout.num_codes, layout.image_ids)]
    if layout.text_length:
        parts.append((packing.TEXT, text, layout.text_length + 1, layout.text_ids))
    return parts


def take_places(x_BL: jax.Array, start: int | jax.Array, count: int) -> jax.Array:
    """`count` places of each sequence from `start` on."""
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x_BL, start, start + count, axis=1)
    index_BM = start[:, None] + jnp.arange(count)
    return jnp.take_along_axis(x_BL, index_BM.reshape(*index_BM.shape, *(1,) * (x_BL.ndim - 2)), axis=1)


def _starts(layout: packing.Layout, tokens_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the first image target and the first text target of each sequence are (they differ by direction)."""
    reverse_B = _reversed(layout, tokens_BL)
    image_B = jnp.where(reverse_B, 0, layout.text_length)
    text_B = jnp.where(reverse_B, layout.num_codes + 1, 0)
    return image_B, text_B


def _reversed(layout: packing.Layout, tokens_BL: jax.Array) -> jax.Array:
    """Which sequences are image -> text. Where there is no text region, none is."""
    first_B = tokens_BL[:, 0] == layout.space.boi
    return first_B if layout.text_length else jnp.zeros_like(first_B)


def prepare_batch(setup: Setup, state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Encodes the batch's images and words with the frozen networks."""
    return encode(setup, state.frozen, batch)


def encode(setup: Setup, params: Mapping[str, train_state.Params], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Puts codes of the batch's images into its packed sequences, and features of its words beside them.

    `params` are of "tokenizer" and "encoder", as far as the setup has these networks.
    """
    if "tokenizer" in setup.networks:
        batch = encode_into(setup, params["tokenizer"], batch)
    if "encoder" in setup.networks:
        batch = dict(batch)
        tokens_BP, mask_BP = (batch.pop(name) for name in PROMPTS)
        module: Any = setup.networks["encoder"].module(params["encoder"])
        batch |= {"features": text_encoder.states(module, tokens_BP, mask_BP), "feature_mask": mask_BP}
    return batch


def encode_into(setup: Setup, params: train_state.Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Encodes the batch's images with these parameters of the tokenizer and puts the codes into the sequences.

    Raises UserError if the images give another grid than the config's.
    """
    module: Any = setup.networks["tokenizer"].module(params)
    codes_Bhw = module.encode_codes(batch["image"])
    if codes_Bhw.shape[1:] != tuple(setup.layout.grid):
        raise UserError(
            f"images of {batch['image'].shape[1]} x {batch['image'].shape[2]} pixels give {codes_Bhw.shape[1:]} codes,"
            f" and config.data.grid is {tuple(setup.layout.grid)}: change one of them."
        )
    ids_BN = codes_Bhw.reshape(codes_Bhw.shape[0], -1) + setup.space.image_start
    if "order" in batch:
        permuted_BN = jnp.take_along_axis(ids_BN, batch["order"], axis=1)
        ids_BN = jnp.where(_reversed(setup.layout, batch["tokens"])[:, None], ids_BN, permuted_BN)
    index_BN = _starts(setup.layout, batch["tokens"])[0][:, None] + jnp.arange(ids_BN.shape[1])
    put = jax.vmap(lambda row, index, ids: row.at[index].set(ids))
    return {
        **batch,
        "targets": put(batch["targets"], index_BN, ids_BN),
        "tokens": put(batch["tokens"], index_BN + 1, ids_BN),
    }
