"""Sampling: prefill, decode, guidance and filters. Used by sample, evaluate, notebooks, and by a server.

Three layers: `generate_codes` and `generate_text` (lists in, arrays out) run one compiled program per tile of rows;
that program is `prefill`, then a loop over `step` and `choose`; and these three are public, so that a server can
admit and interleave requests itself (`Cache.insert`).

The draws of sample i depend on (seed, i) alone, and rows are decoded in tiles of one fixed size, the last one padded: a
picture does not depend on how many others are made beside it.

Shapes: B samples of a tile, R rows of the network (2 B with guidance: first with, then without the prompt), P prompt
length, N tokens to decode, V the part of the vocabulary that may be sampled, C candidates that survive the filters.
"""

import dataclasses
import functools
from collections import abc

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from imagegpt_jax.cli import UserError
from imagegpt_jax.data.packing import SEGMENT, Layout
from imagegpt_jax.models import layers
from imagegpt_jax.models.attention import Cache
from imagegpt_jax.models.gpt import GPT, Sequence

TILE = 8
# Filters look at this many of the largest logits, where that cannot change the result: sorting all is slow.
MAX_CANDIDATES = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the largest.
      top_k: keep the k most likely tokens; 0 = all.
      top_p: then keep the fewest most likely tokens whose probabilities sum to at least p (arXiv:1904.09751).
      cfg_scale: classifier-free guidance, logits = none + scale (prompt - none) (arXiv:2207.12598); 1 = off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cfg_scale: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} must be at least 0.")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise UserError(f"top_k={self.top_k} must be a whole number, at least 0 (0 keeps all tokens).")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1 (1 keeps all tokens).")
        if not self.cfg_scale >= 0:
            raise UserError(f"cfg_scale={self.cfg_scale} must be at least 0 (1 is no guidance).")

    def candidates(self, vocab: int) -> int:
        """C, a compile-time bound on the tokens that can survive the filters; 0 where there is nothing to filter."""
        top_k = self.top_k if 0 < self.top_k < vocab else 0
        if not top_k and self.top_p == 1:
            return 0
        return min(MAX_CANDIDATES, vocab) if 0 < top_k <= MAX_CANDIDATES else vocab

    def arrays(self) -> tuple[Float[Array, ""], Int[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """(temperature, top_k, top_p, cfg_scale) as traced arguments: changing them compiles nothing."""
        return (
            jnp.float32(self.temperature),
            jnp.int32(self.top_k),
            jnp.float32(self.top_p),
            jnp.float32(self.cfg_scale),
        )


# ------------------------------------------------------------------------------------------- the parts, for a server


def prefill(gpt: GPT, prompt: Sequence, capacity: int, *, per_row: bool = False) -> tuple[Float[Array, "R D"], Cache]:
    """Runs prompts into a new cache of `capacity` slots (prefix features take slots too).

    Returns:
      final states of the last tokens, and the cache; `per_row` keeps one length per row, for rows that do not march
      together.
    """
    output = gpt(prompt, gpt.init_cache(prompt.tokens.shape[0], capacity, per_row=per_row))
    assert output.cache is not None
    return output.hidden[:, -1], output.cache


def step(
    gpt: GPT,
    cache: Cache,
    tokens_R: Int[Array, " R"],
    positions_R3: Int[Array, "R 3"],
    *,
    target_positions_R3: Int[Array, "R 3"] | None = None,
    prompt: Sequence | None = None,
) -> tuple[Float[Array, "R D"], Cache]:
    """Adds one token to each row.

    Args:
      gpt: the decoder; `gpt.unstack()` where this is called in a loop.
      cache: from `prefill` or an earlier step.
      tokens_R: ids.
      positions_R3: their (t, row, column).
      target_positions_R3: where the next tokens stand, for a decoder with `target_positions`.
      prompt: what `prefill` was given, for a decoder with adaptive norms, whose condition acts at every step.

    Returns:
      final states of the tokens, and the cache.
    """
    sequence = Sequence(
        tokens=tokens_R[:, None],
        positions=positions_R3[:, None],
        segments=jnp.full((tokens_R.shape[0], 1), SEGMENT, jnp.int32),
        target_positions=None if target_positions_R3 is None else target_positions_R3[:, None],
    )
    if prompt is not None and gpt.config.conditioning == "adaptive_norm":
        sequence = dataclasses.replace(
            sequence, condition=prompt.condition, features=prompt.features, feature_mask=prompt.feature_mask
        )
    output = gpt(sequence, cache)
    assert output.cache is not None
    return output.hidden[:, 0], output.cache


def choose(
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, " B"],
    temperature: Float[Array, "*B"],
    top_k: Int[Array, "*B"],
    top_p: Float[Array, "*B"],
    *,
    candidates: int,
) -> Int[Array, " B"]:
    """Draws one token per row with that row's key; settings are scalars, or one for each row.

    Args:
      logits_BV: fp32 logits.
      keys_B: one key per row.
      temperature: see `Sampling`.
      top_k: see `Sampling`; at most `candidates`.
      top_p: see `Sampling`.
      candidates: C, how many of the largest logits the filters look at; 0 = no filters.
    """
    temperature_B1, top_k_B1, top_p_B1 = (jnp.reshape(x, (-1, 1)) for x in (temperature, top_k, top_p))
    index_BC = None
    if candidates:
        logits_BV, index_BC = jax.lax.top_k(logits_BV, candidates)
    scaled_BC = logits_BV / jnp.maximum(temperature_B1, 1e-6)
    if candidates:
        keep_BC = jnp.arange(candidates) < jnp.where(top_k_B1 > 0, top_k_B1, candidates)
        probs_BC = jax.nn.softmax(jnp.where(keep_BC, scaled_BC, -jnp.inf), axis=-1)
        # A token stays if those before it have not yet reached p; the first always stays.
        keep_BC &= (jnp.cumsum(probs_BC, axis=-1) - probs_BC < top_p_B1) | (top_p_B1 >= 1)
        scaled_BC = jnp.where(keep_BC, scaled_BC, -jnp.inf)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BC)
    drawn_B = jnp.where(temperature_B1[:, 0] > 0, drawn_B, jnp.argmax(scaled_BC, axis=-1))
    if index_BC is not None:
        drawn_B = jnp.take_along_axis(index_BC, drawn_B[:, None], axis=1)[:, 0]
    return drawn_B.astype(jnp.int32)


# --------------------------------------------------------------------------------------------- the compiled program


@functools.partial(jax.jit, static_argnames=("start", "size", "guided", "candidates"))
def _decode(
    gpt: GPT,
    prompt: Sequence,
    keys_B: Key[Array, " B"],
    offsets_N3: Int[Array, "N 3"],
    bias_V: Float[Array, " V"] | None,
    settings: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    *,
    start: int,
    size: int,
    guided: bool,
    candidates: int,
) -> Int[Array, "B N"]:
    """Prompts -> N tokens for each, as numbers within ids `start : start + size`.

    Layers are unrolled and the loop carries one key and one value array per layer: a scan over layers with the cache as
    its input and output would copy the whole cache at every token.
    """
    gpt = gpt.unstack()
    table_VD = gpt.output_table(start, size)
    temperature, top_k, top_p, cfg_scale = settings
    steps = offsets_N3.shape[0]
    prefix = gpt.config.feature_length if gpt.config.conditioning == "prefix" and prompt.features is not None else 0
    hidden_RD, cache = prefill(gpt, prompt, prefix + prompt.tokens.shape[1] + steps - 1)
    # Decoding goes on one after the last token of the prompt, <boi> or <eoi>.
    base_R3 = prompt.positions[:, -1] + 1

    def draw(hidden_RD: jax.Array, i: jax.Array | int) -> Int[Array, " B"]:
        logits_BV = layers.score(hidden_RD, table_VD)
        if guided:
            with_BV, without_BV = jnp.split(logits_BV, 2)
            logits_BV = without_BV + cfg_scale * (with_BV - without_BV)
        if bias_V is not None:
            logits_BV = logits_BV + bias_V
        keys_now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)
        return choose(logits_BV, keys_now_B, temperature, top_k, top_p, candidates=candidates)

    def body(i: jax.Array, carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
        cache, drawn_NB = carry
        tokens_B = jax.lax.dynamic_index_in_dim(drawn_NB, i - 1, keepdims=False) + start
        tokens_R = jnp.concatenate([tokens_B, tokens_B]) if guided else tokens_B
        positions_R3 = base_R3 + offsets_N3[i - 1]
        targets_R3 = base_R3 + offsets_N3[i] if gpt.config.target_positions else None
        hidden_RD, cache = step(gpt, cache, tokens_R, positions_R3, target_positions_R3=targets_R3, prompt=prompt)
        return cache, jax.lax.dynamic_update_index_in_dim(drawn_NB, draw(hidden_RD, i), i, axis=0)

    drawn_NB = jnp.zeros((steps, keys_B.shape[0]), jnp.int32).at[0].set(draw(hidden_RD, 0))
    return jax.lax.fori_loop(1, steps, body, (cache, drawn_NB))[1].T


def _run_tiles(
    gpt: GPT,
    prompt: dict[str, np.ndarray],
    without: dict[str, np.ndarray] | None,
    offsets_N3: np.ndarray,
    bias_V: np.ndarray | None,
    sampling: Sampling,
    seed: int,
    sample_indices: abc.Sequence[int] | np.ndarray | None,
    tile: int,
    progress: abc.Callable[[int, int], None] | None,
    *,
    start: int,
    size: int,
) -> Int[np.ndarray, "B N"]:
    """Runs `_decode` over all samples, a tile at a time."""
    total = prompt["tokens"].shape[0]
    if tile < 1:
        raise UserError(f"tile={tile} must be at least 1.")
    indices = np.arange(total) if sample_indices is None else np.asarray(sample_indices)
    if indices.shape != (total,):
        raise UserError(f"sample_indices has {indices.size} entries for {total} samples.")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices, jnp.uint32))
    drawn_BN = np.zeros((total, offsets_N3.shape[0]), np.int32)
    for first in range(0, total, tile):
        rows = np.minimum(np.arange(first, first + tile), total - 1)  # the last tile is filled with its last sample
        parts = [{k: v[rows] for k, v in p.items()} for p in (prompt, without) if p is not None]
        tokens_BN = _decode(
            gpt,
            Sequence.from_batch({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}),
            keys[rows],
            offsets_N3,
            bias_V,
            sampling.arrays(),
            start=start,
            size=size,
            guided=without is not None,
            candidates=sampling.candidates(size),
        )
        count = min(tile, total - first)
        drawn_BN[first : first + count] = np.asarray(tokens_BN)[:count]
        if progress is not None:
            progress(first + count, total)
    return drawn_BN


# ------------------------------------------------------------------------------------------------------ public calls


def generate_codes(
    gpt: GPT,
    layout: Layout,
    texts: abc.Sequence[abc.Sequence[int]] | None,
    labels: abc.Sequence[int] | np.ndarray | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    *,
    sample_indices: abc.Sequence[int] | np.ndarray | None = None,
    features: tuple[np.ndarray, np.ndarray] | None = None,
    tile: int = TILE,
    progress: abc.Callable[[int, int], None] | None = None,
) -> Int[np.ndarray, "B N"]:
    """Samples the image codes of one picture for each prompt.

    Args:
      gpt: the decoder.
      layout: how it was trained.
      texts: token ids of each prompt; an empty list is an unconditional picture. `None` where only labels are given.
      labels: class of each sample, -1 or `None` for none.
      sampling: how to draw; `None` for the defaults.
      seed: with the sample's index, all that its draws depend on.
      sample_indices: index of each sample (default 0, 1, ...): gives several pictures of one prompt different draws,
        and a picture the same draws when it is made again alone.
      features: a text encoder's output [B, P, E] and its mask [B, P], for a decoder with `feature_width`.
      tile: samples decoded together; another tile may differ in the last bits of the logits.
      progress: called with (samples done, samples in all) after each tile.

    Returns:
      codes in raster order, 0 <= code < num_codes.

    Raises:
      UserError: if prompts do not fit the layout, or settings are out of range.
    """
    sampling = sampling or Sampling()
    prompt = layout.prompt(texts, labels)
    total = prompt["tokens"].shape[0]
    without = layout.prompt([[]] * total) if sampling.cfg_scale != 1 else None
    if features is not None:
        prompt |= {"features": np.asarray(features[0]), "feature_mask": np.asarray(features[1], bool)}
        if without is not None:  # rows without a real feature get the learned ones
            without |= {"features": prompt["features"], "feature_mask": np.zeros_like(prompt["feature_mask"])}
    start, size = layout.image_ids
    offsets_N3 = layout.image_offsets()
    return _run_tiles(
        gpt, prompt, without, offsets_N3, None, sampling, seed, sample_indices, tile, progress, start=start, size=size
    )


def generate_text(
    gpt: GPT,
    layout: Layout,
    codes_BN: np.ndarray,
    sampling: Sampling | None = None,
    seed: int = 0,
    *,
    sample_indices: abc.Sequence[int] | np.ndarray | None = None,
    tile: int = TILE,
    progress: abc.Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Samples a caption (text ids, without specials) for each picture; arguments as in `generate_codes`.

    Raises:
      UserError: if the codes do not fit the layout, the layout has no text, or guidance is asked for.
    """
    sampling = sampling or Sampling()
    if sampling.cfg_scale != 1:
        raise UserError("captions are sampled without guidance: leave cfg_scale at 1.")
    if not layout.space.text_vocab:
        raise UserError("this decoder was trained without text, so it cannot write captions.")
    space = layout.space
    offsets_T3 = np.repeat(np.arange(layout.text_length, dtype=np.int32)[:, None], 3, axis=1)
    bias_V = np.zeros(space.eot + 1, np.float32)
    bias_V[[space.pad, space.boi, space.eoi]] = -np.inf
    prompt = layout.caption_prompt(codes_BN)
    ids_BT = _run_tiles(
        gpt, prompt, None, offsets_T3, bias_V, sampling, seed, sample_indices, tile, progress, start=0, size=bias_V.size
    )
    texts = []
    for ids_T in ids_BT:
        (ends,) = np.nonzero(ids_T == space.eot)
        texts.append(ids_T[: ends[0] if ends.size else None].tolist())
    return texts
