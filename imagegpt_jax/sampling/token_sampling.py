"""From logits to a token: filters without a sort, and one random number for each row. `test_token_sampling.py` shows
that both are exact.

A filter keeps the tokens above a threshold, which is found bit by bit: the bits of a float, read as an integer, rise
with the float. For 4 rows of 16384 that takes a third of the time of `top_k`, and no shape depends on the settings.

Shapes: B rows, V vocabulary, C tokens of a block of the vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from imagegpt_jax.sampling.settings import Sampling

BLOCK = 128  # tokens whose weights are summed before a draw looks into one of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Filters:
    """`Sampling`'s settings as traced arrays, scalars or one for each row: changing them compiles nothing."""

    temperature: Float[Array, "*B"]
    top_k: Int[Array, "*B"]
    top_p: Float[Array, "*B"]
    min_p: Float[Array, "*B"]

    @classmethod
    def of(cls, sampling: Sampling) -> "Filters":
        """The filters of a sampler."""
        temperature, top_p, min_p = map(jnp.float32, (sampling.temperature, sampling.top_p, sampling.min_p))
        return cls(temperature, jnp.int32(sampling.top_k), top_p, min_p)


def sample_tokens(logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"], filters: Filters) -> Int[Array, " B"]:
    """Draws a token per row with that row's key, from logits, taken in fp32, that are -inf where none must be drawn."""
    weights_BV = filtered_probabilities(logits_BV, filters)
    drawn_B = sample_index(weights_BV, jax.vmap(functools.partial(jax.random.uniform, dtype=jnp.float32))(keys_B))
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jnp.where(filters.temperature.reshape(-1) > 0, drawn_B, greedy_B)


def filtered_probabilities(logits_BV: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """Probabilities, but for a factor in each row; 0 where a filter has dropped the token."""
    temperature, top_k, top_p, min_p = (
        jnp.reshape(x, (-1, 1)) for x in (filters.temperature, filters.top_k, filters.top_p, filters.min_p)
    )
    # At temperature 0 the draw is not used; 1 keeps its numbers finite.
    scaled_BV = logits_BV.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1)
    top_k = jnp.where(top_k > 0, top_k, scaled_BV.shape[-1])
    weights_BV = jnp.exp(scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True))
    weights_BV = jax.lax.cond(
        jnp.any(top_k < scaled_BV.shape[-1]), lambda w: jnp.where(top_k_mask(w, top_k), w, 0), lambda w: w, weights_BV
    )
    weights_BV = jax.lax.cond(
        jnp.any(top_p < 1), lambda w: jnp.where(top_p_mask(w, top_p), w, 0), lambda w: w, weights_BV
    )
    return jnp.where(weights_BV >= min_p, weights_BV, 0)  # the likeliest token weighs 1


def top_k_mask(values_BV: Float[Array, "B V"], count: Int[Array, "..."]) -> Bool[Array, "B V"]:
    """Which are the `count` largest of each row of values that are not negative; of equal ones the first."""
    bits_BV = jax.lax.bitcast_convert_type(values_BV, jnp.int32)
    least_B1 = _bisect(lambda t: jnp.sum(bits_BV >= t, axis=-1, keepdims=True) >= count, len(values_BV))
    above_BV, equal_BV = bits_BV > least_B1, bits_BV == least_B1
    left_B1 = count - jnp.sum(above_BV, axis=-1, keepdims=True)
    return above_BV | _first(equal_BV, left_B1)


def top_p_mask(weights_BV: Float[Array, "B V"], share: Float[Array, "..."]) -> Bool[Array, "B V"]:
    """Which tokens, from the largest weight down, come before the weights sum to `share` of all; equal ones by id."""
    bits_BV = jax.lax.bitcast_convert_type(weights_BV, jnp.int32)
    wanted_B1 = share * jnp.sum(weights_BV, axis=-1, keepdims=True)

    def mass(keep_BV: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keep_BV, weights_BV, 0), axis=-1, keepdims=True)

    least_B1 = _bisect(lambda t: mass(bits_BV >= t) >= wanted_B1, len(weights_BV))
    above_BV, equal_BV = bits_BV > least_B1, bits_BV == least_B1
    weight_B1 = jax.lax.bitcast_convert_type(least_B1, jnp.float32)
    left_B1 = jnp.ceil((wanted_B1 - mass(above_BV)) / jnp.where(weight_B1 > 0, weight_B1, 1))
    return above_BV | _first(equal_BV, left_B1) | (share >= 1)


def _bisect(holds, rows: int) -> Int[Array, "B 1"]:
    """The largest bits of a float at or above zero for which `holds`, which is true up to some number; else 0."""

    def body(i: jax.Array, low_B1: jax.Array) -> jax.Array:
        middle_B1 = low_B1 + (jnp.int32(1) << (30 - i))
        return jnp.where(holds(middle_B1), middle_B1, low_B1)

    return jax.lax.fori_loop(0, 31, body, jnp.zeros((rows, 1), jnp.int32))


def _first(flags_BV: Bool[Array, "B V"], count_B1: jax.Array) -> Bool[Array, "B V"]:
    """The first `count` that are set in each row; the sum along a row is taken only where more are set."""
    return jax.lax.cond(
        jnp.any(jnp.sum(flags_BV, axis=-1, keepdims=True) > count_B1),
        lambda: flags_BV & (jnp.cumsum(flags_BV, axis=-1) <= count_B1),
        lambda: flags_BV,
    )


def sample_index(weights_BV: Float[Array, "B V"], uniform_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """The token at which the sums of weights pass `uniform` of the whole: first among blocks, then within one."""
    size = weights_BV.shape[-1]
    padded_BV = jnp.pad(weights_BV, ((0, 0), (0, -size % BLOCK)))
    blocks_BXC = padded_BV.reshape(len(weights_BV), -1, BLOCK)
    ends_BX = jnp.cumsum(jnp.sum(blocks_BXC, axis=-1), axis=-1)
    total_B1 = ends_BX[:, -1:]
    target_B1 = jnp.minimum(uniform_B[:, None] * total_B1, jnp.nextafter(total_B1, jnp.zeros_like(total_B1)))
    block_B1 = jnp.sum(ends_BX <= target_B1, axis=-1, keepdims=True)
    before_B1 = jnp.where(block_B1 > 0, jnp.take_along_axis(ends_BX, jnp.maximum(block_B1 - 1, 0), axis=1), 0)
    inside_BC = jnp.take_along_axis(blocks_BXC, block_B1[..., None], axis=1)[:, 0]
    token_B1 = jnp.sum(jnp.cumsum(inside_BC, axis=-1) <= target_B1 - before_B1, axis=-1, keepdims=True)
    # Sums of parts may end below the sum of the block: then it is the block's last token of any weight.
    last_B1 = jnp.max(jnp.where(inside_BC > 0, jnp.arange(BLOCK), 0), axis=-1, keepdims=True)
    return (block_B1 * BLOCK + jnp.minimum(token_B1, last_B1))[:, 0].astype(jnp.int32)


def completes_ngram(drawn_BN: Int[Array, "B N"], count: Int[Array, ""], size: int, vocab: int) -> Bool[Array, "B V"]:
    """Which tokens would complete an n-gram of `size` tokens that is already among the first `count` drawn."""
    length = drawn_BN.shape[1]
    ends = jnp.arange(length)  # an earlier n-gram ends here
    same_BN = jnp.broadcast_to((ends < count) & (ends >= size - 1), drawn_BN.shape)
    for back in range(1, size):
        then_BN = jnp.roll(drawn_BN, back, axis=1)
        now_B1 = jax.lax.dynamic_slice_in_dim(drawn_BN, jnp.maximum(count - back, 0), 1, axis=1)
        same_BN &= then_BN == now_B1
    rows = jnp.arange(drawn_BN.shape[0])[:, None]
    return jnp.zeros((drawn_BN.shape[0], vocab), bool).at[rows, drawn_BN].max(same_BN)
