"""Speculative Jacobi decoding (arXiv:2410.01699): several tokens a step, drawn from exactly the same distribution.

A window of guessed tokens goes through the network at once. Guess x, drawn from q, is accepted with probability
min(1, p(x) / q(x)), where p is what the network says after the tokens before it; the first one that is not is drawn
anew from max(0, p - q) (arXiv:2211.17192). The p of the window, found after guesses that may be wrong, are the q of the
next one. Each step so fixes one token or more; at temperature 0 guesses are accepted if they are the likeliest.

Shapes: B samples, R rows, W window, N tokens, V ids that may be drawn.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagegpt_jax.models.attention import Cache
from imagegpt_jax.models.gpt import GPT
from imagegpt_jax.parallel import manual_collectives
from imagegpt_jax.sampling import engine, token_sampling
from imagegpt_jax.sampling.decode_weights import score


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """`guesses` and `q` are of the tokens from `count` on; `drawn` holds `count` tokens and then nothing of use."""

    cache: Cache
    drawn: Int[Array, "B N"]
    log_likelihood: Float[Array, " B"]
    count: Int[Array, " B"]
    steps: Int[Array, " B"]
    guesses: Int[Array, "B W"]
    q: Float[Array, "B W V"]


def _probabilities(logits: Float[Array, "*_ V"], filters: token_sampling.Filters) -> Float[Array, "*_ V"]:
    """What `sample_tokens` draws from; at temperature 0 all of it on the likeliest."""
    flat = logits.reshape(-1, logits.shape[-1])
    weights = token_sampling.filtered_probabilities(flat, filters)
    greedy = jax.nn.one_hot(jnp.argmax(flat, axis=-1), flat.shape[-1])
    weights = jnp.where(filters.temperature > 0, weights / jnp.sum(weights, axis=-1, keepdims=True), greedy)
    return weights.reshape(logits.shape)


def _picks(weights_BWV: Float[Array, "B W V"], keys_B: jax.Array) -> Int[Array, "B W"]:
    """One draw from each of the distributions of each row."""
    samples, window, size = weights_BWV.shape
    uniform_BW = jax.vmap(lambda key: jax.random.uniform(key, (window,)))(keys_B)
    return token_sampling.sample_index(weights_BWV.reshape(-1, size), uniform_BW.reshape(-1)).reshape(samples, window)


@functools.partial(jax.jit, static_argnames=("shape", "window"))
def decode(
    gpt: GPT, rows: engine.Rows, settings: engine.Settings, *, shape: engine.Shape, window: int
) -> tuple[Int[Array, "B N"], Float[Array, " B"], Int[Array, " B"]]:
    """Draws all tokens; arguments as for `engine.start`, and the number of guesses W.

    Returns:
      (tokens, sum of their log-probabilities as in `engine.State`, passes of the network that each sample needed, the
      prompt's included; plain decoding takes N)
    """
    mapped = manual_collectives.map_rows(functools.partial(_decode, shape=shape, window=window), (False, True, False))
    return mapped(gpt, rows, settings)


def _decode(
    gpt: GPT, rows: engine.Rows, settings: engine.Settings, *, shape: engine.Shape, window: int
) -> tuple[Int[Array, "B N"], Float[Array, " B"], Int[Array, " B"]]:
    prompt, steps, samples = rows.prompt, settings.offsets.shape[0], rows.keys.shape[0]
    groups = shape.prompts + shape.guided
    table_VD = gpt.output_table(shape.start, shape.size)
    base_R3 = prompt.positions[:, -1] + 1
    ahead_W = jnp.arange(window)

    def to_rows(x: jax.Array) -> jax.Array:
        return jnp.tile(x, (groups,) + (1,) * (x.ndim - 1))

    def distributions(hidden: jax.Array, at_BW: jax.Array) -> tuple[Float[Array, "B W V"], Float[Array, "B W V"]]:
        """What tokens number `at` are drawn from, given final states [R, W, D]; log-probabilities before filters."""
        logits = score(hidden.reshape(-1, hidden.shape[-1]), table_VD)
        mix = None if rows.mix is None else jnp.repeat(rows.mix, at_BW.shape[1], axis=0)
        number_BW = jnp.minimum(at_BW, steps - 1)
        logits = engine.mixed(logits, shape, mix, settings.guidance[number_BW].reshape(-1, 1), settings.bias)
        logits_BWV = logits.reshape(*at_BW.shape, -1)
        p_BWV = _probabilities(logits_BWV, settings.filters)
        if rows.given is not None:  # a given token is drawn for certain
            given_BW = jnp.take_along_axis(rows.given, number_BW, axis=1)
            certain_BWV = jax.nn.one_hot(given_BW, shape.size)
            p_BWV = jnp.where((given_BW == engine.UNKNOWN)[..., None], p_BWV, certain_BWV)
        return p_BWV, jax.nn.log_softmax(logits_BWV, axis=-1)

    def of_tokens(values_BWV: jax.Array, tokens_BW: jax.Array) -> Float[Array, "B W"]:
        return jnp.take_along_axis(values_BWV, tokens_BW[..., None], axis=2)[..., 0]

    def keys(step: jax.Array | int, use: int) -> jax.Array:
        return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, step), use))(rows.keys)

    # --- The prompt and the first token; the first guesses are drawn as if they stood where it does.
    capacity = engine.prompt_slots(gpt, prompt) + steps - 1 + window
    hidden_RD, cache = engine.prefill(gpt, prompt, capacity, per_row=True)
    p_B1V, log_p_B1V = distributions(hidden_RD[:, None], jnp.zeros((samples, 1), jnp.int32))
    q_BWV = jnp.broadcast_to(p_B1V, (samples, window, shape.size))
    first_B1 = _picks(p_B1V, keys(0, 0))
    state = _State(
        cache=cache,
        drawn=jnp.zeros((samples, steps + window), jnp.int32).at[:, :1].set(first_B1),
        log_likelihood=of_tokens(log_p_B1V, first_B1)[:, 0],
        count=jnp.ones((samples,), jnp.int32),
        steps=jnp.ones((samples,), jnp.int32),
        guesses=_picks(q_BWV, keys(0, 1)),
        q=q_BWV,
    )

    def body(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
        step, state = carry
        # --- One pass: the last token and all guesses but the last; W distributions come out.
        last_B1 = jnp.take_along_axis(state.drawn, state.count[:, None] - 1, axis=1)
        tokens_BW = jnp.concatenate([last_B1, state.guesses[:, :-1]], axis=1) + shape.start
        at_BW = state.count[:, None] + ahead_W
        limit = steps - 1
        positions = to_rows(settings.offsets[jnp.minimum(at_BW - 1, limit)]) + base_R3[:, None]
        targets = to_rows(settings.offsets[jnp.minimum(at_BW, limit)]) + base_R3[:, None]
        hidden, cache = engine.extend(
            gpt, state.cache, to_rows(tokens_BW), positions, targets if gpt.config.target_positions else None, prompt
        )
        p_BWV, log_p_BWV = distributions(hidden, at_BW)

        # --- Guesses are accepted up to the first that is not; in its place, or after all, one more is drawn.
        p_of, q_of = of_tokens(p_BWV, state.guesses), of_tokens(state.q, state.guesses)
        uniform_BW = jax.vmap(lambda key: jax.random.uniform(key, (window,)))(keys(step, 2))
        accepted_BW = (uniform_BW * q_of < p_of) & (ahead_W < window - 1)
        fixed_B = jnp.sum(jnp.cumprod(accepted_BW, axis=1), axis=1, dtype=jnp.int32)
        p_next = jnp.take_along_axis(p_BWV, fixed_B[:, None, None], axis=1)
        q_next = jnp.take_along_axis(state.q, fixed_B[:, None, None], axis=1)
        rest = jnp.where((fixed_B == window - 1)[:, None, None], p_next, jnp.maximum(p_next - q_next, 0))
        rest = jnp.where(jnp.sum(rest, axis=2, keepdims=True) > 0, rest, p_next)
        next_B1 = _picks(rest, keys(step, 3))
        new_BW = jnp.where(ahead_W < fixed_B[:, None], state.guesses, next_B1)
        drawn = jax.vmap(jax.lax.dynamic_update_slice)(state.drawn, new_BW, state.count[:, None])
        counted_BW = (ahead_W <= fixed_B[:, None]) & (at_BW < steps)
        log_likelihood = jnp.sum(jnp.where(counted_BW, of_tokens(log_p_BWV, new_BW), 0), axis=1)

        # --- Guesses for what follows, from this pass; where it did not reach, from its last distribution.
        from_BW = jnp.minimum(fixed_B[:, None] + 1 + ahead_W, window - 1)
        q_BWV = jnp.take_along_axis(p_BWV, from_BW[..., None], axis=1)
        going_B = state.count < steps
        moved_B = jnp.where(going_B, fixed_B + 1, 0)
        # The cache has grown by W; what belongs to tokens that are not fixed is written over.
        back_R = to_rows(window - moved_B)
        new = _State(
            cache=dataclasses.replace(cache, length=cache.length - back_R),
            drawn=jnp.where(going_B[:, None], drawn, state.drawn),
            log_likelihood=state.log_likelihood + log_likelihood,
            count=state.count + moved_B,
            steps=state.steps + going_B,
            guesses=_picks(q_BWV, keys(step, 4)),
            q=q_BWV,
        )
        return step + 1, new

    _, state = jax.lax.while_loop(lambda carry: jnp.any(carry[1].count < steps), body, (jnp.int32(1), state))
    return state.drawn[:, :steps], state.log_likelihood, state.steps
