"""Several codes at once, for decoders trained in random order (RAR, arXiv:2411.00776): fewer passes, other pictures.

Such a decoder is told where the token stands that it is to predict (`target_positions`). So the last token is entered k
times, each time with another target; these copies do not see one another, and k codes are drawn as if they did not
depend on each other. With k = 1 that is plain decoding, to the same codes.

Shapes: B samples, R rows, N tokens, k tokens of a step, P prompt length.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt import GPT, Sequence
from imagegpt_jax.parallel import manual_collectives
from imagegpt_jax.sampling import engine, token_sampling
from imagegpt_jax.sampling.decode_weights import score

Drawn = tuple[Int[Array, "B N"], Float[Array, " B"]]  # tokens, and the sum of their log-probabilities


@functools.partial(jax.jit, static_argnames=("shape", "tokens_per_step"))
def decode(
    gpt: GPT, rows: engine.Rows, settings: engine.Settings, *, shape: engine.Shape, tokens_per_step: int
) -> Drawn:
    """Samples `tokens_per_step` tokens in each forward pass. Raises UserError for a prompt of features alone.

    Arguments are those of `engine.start`, of a decoder with `target_positions`. The k tokens of a pass are neighbours
    in `settings.offsets`, should be far apart in the picture, and count as if they did not depend on each other.
    """
    mapped = manual_collectives.map_rows(
        functools.partial(_decode, shape=shape, tokens_per_step=tokens_per_step), (False, True, False)
    )
    return mapped(gpt, rows, settings)


def _decode(
    gpt: GPT, rows: engine.Rows, settings: engine.Settings, *, shape: engine.Shape, tokens_per_step: int
) -> Drawn:
    prompt, steps, samples = rows.prompt, settings.offsets.shape[0], rows.keys.shape[0]
    groups, k = shape.prompts + shape.guided, tokens_per_step
    table_VD = gpt.output_table(shape.start, shape.size)
    base_R13 = prompt.positions[:, -1:] + 1
    count, passes = prompt.tokens.shape[0], -(-steps // k)
    given = rows.given
    if given is not None:  # the last pass may reach beyond the picture
        given = jnp.pad(given, ((0, 0), (0, passes * k - steps)), constant_values=engine.UNKNOWN)

    def offsets(index: jax.Array) -> jax.Array:
        """Positions [R, L, 3] of tokens by their number in the order; those after the last are the last's."""
        return base_R13 + settings.offsets[jnp.clip(index, 0, steps - 1)]

    def choose(hidden_RkD: jax.Array, first: jax.Array | int, drawn: Drawn) -> Drawn:
        number_k = first + jnp.arange(k)
        logits = score(hidden_RkD.reshape(count * k, -1), table_VD)
        mix = None if rows.mix is None else jnp.repeat(rows.mix, k, axis=0)
        scale = jnp.tile(settings.guidance[jnp.minimum(number_k, steps - 1)], samples)[:, None]
        logits = engine.mixed(logits, shape, mix, scale, settings.bias)
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        tokens = token_sampling.sample_tokens(logits, fold(rows.keys, number_k).reshape(-1), settings.filters)
        if given is not None:
            given_X = jax.lax.dynamic_slice_in_dim(given, first, k, axis=1).reshape(-1)
            tokens = jnp.where(given_X == engine.UNKNOWN, tokens, given_X)
        log_probs_X1 = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, None], axis=1)
        log_probs_Bk = jnp.where(number_k < steps, log_probs_X1.reshape(samples, k), 0)
        tokens = jax.lax.dynamic_update_slice(drawn[0], tokens.reshape(samples, k), (0, first))
        return tokens, drawn[1] + jnp.sum(log_probs_Bk, axis=1)

    # --- The prompt but for its last token, which is entered once for each of the first k codes.
    length, slots = prompt.tokens.shape[1], engine.prompt_slots(gpt, prompt)
    cache = gpt.init_cache(count, slots + passes * k + k)
    if length > 1:
        output = gpt(prompt.first(length - 1), cache)
        assert output.cache is not None
        cache = output.cache
    elif slots > length:
        raise UserError("drawing several codes at once after features alone is not possible: give text_length >= 1.")

    def copies(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, k, axis=1)

    first = Sequence(
        tokens=copies(prompt.tokens[:, -1:]),
        positions=copies(prompt.positions[:, -1:]),
        segments=copies(prompt.segments[:, -1:]),
        target_positions=jnp.broadcast_to(offsets(jnp.arange(k)), (count, k, 3)),
        condition=prompt.condition,
    )
    if gpt.config.conditioning == "adaptive_norm":
        first = dataclasses.replace(first, features=prompt.features, feature_mask=prompt.feature_mask)
    output = gpt(first, cache, alone=k)
    assert output.cache is not None
    cache = _forget(output.cache, k - 1)
    drawn = choose(output.hidden, 0, (jnp.zeros((samples, passes * k), jnp.int32), jnp.zeros((samples,))))

    def body(i: jax.Array, carry: Any) -> Any:
        cache, drawn = carry
        last = jax.lax.dynamic_slice_in_dim(drawn[0], (i - 1) * k, k, axis=1) + shape.start
        tokens = jnp.tile(jnp.concatenate([last, jnp.repeat(last[:, -1:], k - 1, axis=1)], axis=1), (groups, 1))
        # k codes with what follows them in the order, the last of them k times with the next k.
        own = jnp.concatenate([jnp.arange(k), jnp.full((k - 1,), k - 1)]) + (i - 1) * k
        target = jnp.concatenate([jnp.arange(1, k), k + jnp.arange(k)]) + (i - 1) * k
        shape_RL3 = (count, 2 * k - 1, 3)
        hidden, cache = engine.extend(
            gpt,
            cache,
            tokens,
            jnp.broadcast_to(offsets(own), shape_RL3),
            jnp.broadcast_to(offsets(target), shape_RL3),
            prompt,
            alone=k,
        )
        return _forget(cache, k - 1), choose(hidden[:, k - 1 :], i * k, drawn)

    _, (tokens, log_likelihood) = jax.lax.fori_loop(1, passes, body, (cache, drawn))
    return tokens[:, :steps], log_likelihood


def _forget(cache: Any, count: int) -> Any:
    """The cache without its last tokens, which are written over."""
    return dataclasses.replace(cache, length=cache.length - count)
