"""The decoding loop: prefill, then one compiled loop over a cache that is updated in place.

`prefill` and `step` are the parts that a server interleaves itself (`Cache.insert`). `start` and `advance` are the loop
of everything else: `start` runs the prompts of a batch and draws the first token, `advance` goes on to any later token
and may be called again. Nothing compiles anew for other prompts, settings or schedules; only for other shapes.

A step reads all slots of the cache, written or not. So a long image is decoded in `cache_segments`, between which the
cache grows (`grow`): in three of equal length a third of the slots need not be read.

A batch decodes B samples in R rows of the network: G prompts for each (one, or several whose logits are mixed), and
with guidance one more without prompt. Rows lie group by group: [prompt 1 of all samples, prompt 2 of all, ..., none of
all].

Shapes: B samples of a batch, R rows, G prompts of a sample, N tokens to decode, P prompt length, D width, V ids that
may be sampled.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from imagegpt_jax.data.packing import SEGMENT
from imagegpt_jax.models.attention import Cache
from imagegpt_jax.models.gpt import GPT, Sequence
from imagegpt_jax.parallel import manual_collectives
from imagegpt_jax.sampling import token_sampling
from imagegpt_jax.sampling.decode_weights import score
from imagegpt_jax.sampling.settings import UNKNOWN

# Each segment is a program of its own: so many at most, and none for fewer tokens than this.
MAX_SEGMENTS = 4
MIN_SEGMENT = 64

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
      gpt: the decoder; `prepare(gpt)` where this is called in a loop.
      cache: from `prefill` or an earlier step.
      tokens_R: ids.
      positions_R3: their (t, row, column).
      target_positions_R3: where the next tokens stand, for a decoder with `target_positions`.
      prompt: what `prefill` was given, for a decoder with adaptive norms, whose condition acts at every step.

    Returns:
      final states of the tokens, and the cache.
    """
    targets_R13 = None if target_positions_R3 is None else target_positions_R3[:, None]
    hidden_R1D, cache = extend(gpt, cache, tokens_R[:, None], positions_R3[:, None], targets_R13, prompt)
    return hidden_R1D[:, 0], cache


def extend(
    gpt: GPT,
    cache: Cache,
    tokens_RL: Int[Array, "R L"],
    positions_RL3: Int[Array, "R L 3"],
    target_positions_RL3: Int[Array, "R L 3"] | None = None,
    prompt: Sequence | None = None,
    alone: int = 0,
) -> tuple[Float[Array, "R L D"], Cache]:
    """Adds L tokens to each row, as `step` adds one; the last `alone` of them do not see one another."""
    sequence = Sequence(
        tokens=tokens_RL,
        positions=positions_RL3,
        segments=jnp.full(tokens_RL.shape, SEGMENT, jnp.int32),
        target_positions=target_positions_RL3,
    )
    if prompt is not None and gpt.config.conditioning == "adaptive_norm":
        sequence = dataclasses.replace(
            sequence, condition=prompt.condition, features=prompt.features, feature_mask=prompt.feature_mask
        )
    output = gpt(sequence, cache, alone=alone)
    assert output.cache is not None
    return output.hidden, output.cache


# --------------------------------------------------------------------------------------------------------- the loop


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a program is compiled for, beside the shapes of its arrays.

    Attributes:
      start: first of the ids that may be drawn.
      size: V, how many there are.
      prompts: G.
      guided: whether rows without a prompt follow.
      no_repeat_ngram_size: see `Sampling`.
    """

    start: int
    size: int
    prompts: int = 1
    guided: bool = False
    no_repeat_ngram_size: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What differs from sample to sample; sharded over the devices of a mesh.

    Attributes:
      prompt: R rows.
      keys: one for each sample.
      mix: share of each prompt's logits, for G > 1.
      given: tokens that are not drawn but given, within 0 to V - 1; UNKNOWN elsewhere; None where all are free.
    """

    prompt: Sequence
    keys: Key[Array, " B"]
    mix: Float[Array, "B G"] | None = None
    given: Int[Array, "B N"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What is the same for all samples.

    Attributes:
      offsets: position of each token, less that after the prompt's last.
      filters: how to draw.
      guidance: scale at each token.
      bias: added to the logits, -inf for ids that must not be drawn; None for none.
    """

    offsets: Int[Array, "N 3"]
    filters: token_sampling.Filters
    guidance: Float[Array, " N"]
    bias: Float[Array, " V"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where the loop stands.

    Attributes:
      cache: of R rows.
      drawn: tokens as numbers from 0 to V - 1; zero after the first `count`.
      log_likelihood: sum of the tokens' log-probabilities under the mixed and guided logits, before filters; of given
        tokens too.
      count: tokens drawn.
    """

    cache: Cache
    drawn: Int[Array, "B N"]
    log_likelihood: Float[Array, " B"]
    count: Int[Array, ""]


def mixed(
    logits_RV: Float[Array, "R V"],
    shape: Shape,
    mix_BG: Float[Array, "B G"] | None,
    scale: Float[Array, "..."],
    bias_V: Float[Array, " V"] | None,
) -> Float[Array, "B V"]:
    """Logits of samples from those of rows: the mean of prompts by their shares, then guidance, then the bias."""
    parts = jnp.split(logits_RV, shape.prompts + shape.guided)
    logits_BV = parts[0]
    if mix_BG is not None:
        logits_BV = jnp.einsum("bg,gbv->bv", mix_BG, jnp.stack(parts[: shape.prompts]))
    if shape.guided:
        logits_BV = parts[-1] + scale * (logits_BV - parts[-1])
    return logits_BV if bias_V is None else logits_BV + bias_V


def _sample_next(
    table_VD: Float[Array, "V D"],
    shape: Shape,
    rows: Rows,
    settings: Settings,
    state: State,
    hidden_RD: Float[Array, "R D"],
) -> State:
    """Draws token number `state.count` from final states and the head's rows of the ids that may be drawn."""
    i = state.count
    logits_BV = mixed(score(hidden_RD, table_VD), shape, rows.mix, settings.guidance[i], settings.bias)
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    if shape.no_repeat_ngram_size:
        logits_BV = jnp.where(
            token_sampling.completes_ngram(state.drawn, i, shape.no_repeat_ngram_size, shape.size), -jnp.inf, logits_BV
        )
    tokens_B = token_sampling.sample_tokens(
        logits_BV, jax.vmap(jax.random.fold_in, (0, None))(rows.keys, i), settings.filters
    )
    if rows.given is not None:
        given_B = jax.lax.dynamic_index_in_dim(rows.given, i, axis=1, keepdims=False)
        tokens_B = jnp.where(given_B == UNKNOWN, tokens_B, given_B)
    log_probs_B = jnp.take_along_axis(log_probs_BV, tokens_B[:, None], axis=1)[:, 0]
    return dataclasses.replace(
        state,
        drawn=jax.lax.dynamic_update_index_in_dim(state.drawn, tokens_B, i, axis=1),
        log_likelihood=state.log_likelihood + log_probs_B,
        count=i + 1,
    )


def prompt_slots(gpt: GPT, prompt: Sequence) -> int:
    """Slots of the cache that a prompt takes, with its prefix features."""
    prefix = gpt.config.feature_length if gpt.config.conditioning == "prefix" and prompt.features is not None else 0
    return prefix + prompt.tokens.shape[1]


def cache_segments(slots: int, steps: int) -> list[tuple[int, int]]:
    """(capacity of the cache, tokens drawn at its end) of each segment of an image.

    Args:
      slots: that the prompt takes.
      steps: tokens to draw; the last one is not written to the cache.
    """
    count = max(1, min(MAX_SEGMENTS, (steps - 1) // MIN_SEGMENT))
    ends = [1 + -(-(steps - 1) * i // count) for i in range(1, count + 1)]
    return [(slots + end - 1, end) for end in ends]


def _start(gpt: GPT, rows: Rows, settings: Settings, *, shape: Shape) -> State:
    prompt, steps = rows.prompt, settings.offsets.shape[0]
    slots = prompt_slots(gpt, prompt)
    hidden_RD, cache = prefill(gpt, prompt, cache_segments(slots, steps)[0][0])
    samples = rows.keys.shape[0]
    state = State(cache, jnp.zeros((samples, steps), jnp.int32), jnp.zeros((samples,)), jnp.zeros((), jnp.int32))
    return _sample_next(gpt.output_table(shape.start, shape.size), shape, rows, settings, state, hidden_RD)


def _advance(gpt: GPT, rows: Rows, settings: Settings, state: State, stop: jax.Array, *, shape: Shape) -> State:
    # Decoding goes on one after the last token of the prompt, <boi> or <eoi>.
    base_R3 = rows.prompt.positions[:, -1] + 1
    table_VD = gpt.output_table(shape.start, shape.size)  # cut out once, not at every token

    def body(i: jax.Array, state: State) -> State:
        tokens_B = jax.lax.dynamic_index_in_dim(state.drawn, i - 1, axis=1, keepdims=False) + shape.start
        tokens_R = jnp.tile(tokens_B, shape.prompts + shape.guided)
        targets_R3 = base_R3 + settings.offsets[i] if gpt.config.target_positions else None
        hidden_RD, cache = step(
            gpt,
            state.cache,
            tokens_R,
            base_R3 + settings.offsets[i - 1],
            target_positions_R3=targets_R3,
            prompt=rows.prompt,
        )
        return _sample_next(table_VD, shape, rows, settings, dataclasses.replace(state, cache=cache), hidden_RD)

    return jax.lax.fori_loop(state.count, stop, body, state)


@functools.partial(jax.jit, static_argnames="shape")
def start(gpt: GPT, rows: Rows, settings: Settings, *, shape: Shape) -> State:
    """Runs the prompts into a cache for the first of the `cache_segments`, and draws the first token.

    `gpt` is from `prepare`; on a mesh the rows of one device follow those of another.
    """
    return manual_collectives.map_rows(functools.partial(_start, shape=shape), (False, True, False))(
        gpt, rows, settings
    )


@functools.partial(jax.jit, static_argnames="capacity")
def grow(state: State, capacity: int) -> State:
    """The same state with a cache of `capacity` slots."""
    return dataclasses.replace(state, cache=state.cache.grown(capacity))


@functools.partial(jax.jit, static_argnames="shape", donate_argnames="state")
def advance(gpt: GPT, rows: Rows, settings: Settings, state: State, stop: Any, *, shape: Shape) -> State:
    """Draws on until `stop` tokens are drawn, for which the cache must have room; takes over the buffers of `state`.

    The same arguments as for `start`.
    """
    mapped = manual_collectives.map_rows(functools.partial(_advance, shape=shape), (False, True, False, True, False))
    return mapped(gpt, rows, settings, state, jnp.asarray(stop, jnp.int32))
