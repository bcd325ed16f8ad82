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
import numpy as np
from jaxtyping import Array, Int

from imagegpt_jax.cli import UserError
from imagegpt_jax.models.gpt import GPT, Sequence
from imagegpt_jax.sampling import draw, engine, tiles
from imagegpt_jax.sampling.prepare import score
from imagegpt_jax.sampling.settings import Sampling


def run(
    gpt: GPT,
    job: tiles.Job,
    sampling: Sampling,
    seed: int = 0,
    *,
    together: int,
    order: np.ndarray | None = None,
    sample_indices: Any = None,
    tile: int = tiles.TILE,
) -> Int[np.ndarray, "B N"]:
    """Decodes a job, `together` codes a pass.

    Args:
      gpt: the decoder, as trained or from `tiles.place`; with `target_positions`.
      job: what to decode; without given tokens.
      sampling: how to draw; without `no_repeat`.
      seed: with the sample's index, all that its draws depend on.
      together: k, codes drawn in one pass.
      order: the place in raster order of the first code, the second, ...; by default a random order from the seed, as
        codes that are drawn at once should be far apart. With k = 1: raster order.
      sample_indices: index of each sample (default 0, 1, ...).
      tile: samples decoded together.

    Returns:
      tokens in raster order.

    Raises:
      UserError: for a decoder without `target_positions`, and for what is not possible.
    """
    if not gpt.config.target_positions:
        raise UserError("drawing several codes at once needs a decoder trained in random order (target_positions).")
    if together < 1 or job.given is not None or sampling.no_repeat:
        raise UserError(f"together={together} must be at least 1, without given tokens and no_repeat.")
    steps = len(job.offsets)
    if order is None:
        order = np.arange(steps) if together == 1 else np.random.default_rng(seed).permutation(steps)
    gpt = tiles.place(gpt, sampling.weights)
    shape, settings = tiles.plan(dataclasses.replace(job, offsets=job.offsets[order]), sampling)
    indices = np.arange(job.total) if sample_indices is None else np.asarray(sample_indices)
    keys, out = tiles.sample_keys(seed, indices), np.zeros((job.total, steps), np.int32)
    for first in range(0, job.total, tile):
        samples = np.minimum(np.arange(first, first + tile), job.total - 1)
        drawn_BN = _decode(gpt, tiles.rows_of(job, keys, samples[None]), settings, shape=shape, together=together)
        count = min(tile, job.total - first)
        out[first : first + count, order] = np.asarray(drawn_BN)[:count]
    return out


@functools.partial(jax.jit, static_argnames=("shape", "together"))
def _decode(
    gpt: GPT, rows: engine.Rows, settings: engine.Settings, *, shape: engine.Shape, together: int
) -> Int[Array, "B N"]:
    prompt, steps, samples = rows.prompt, settings.offsets.shape[0], rows.keys.shape[0]
    groups, k = shape.prompts + shape.guided, together
    table_VD = gpt.output_table(shape.start, shape.size)
    base_R13 = prompt.positions[:, -1:] + 1
    count = prompt.tokens.shape[0]

    def offsets(index: jax.Array) -> jax.Array:
        """Positions [R, L, 3] of tokens by their number in the order; those after the last are the last's."""
        return base_R13 + settings.offsets[jnp.clip(index, 0, steps - 1)]

    def choose(hidden_RkD: jax.Array, first: jax.Array | int, drawn: jax.Array) -> jax.Array:
        number_k = first + jnp.arange(k)
        logits = score(hidden_RkD.reshape(count * k, -1), table_VD)
        mix = None if rows.mix is None else jnp.repeat(rows.mix, k, axis=0)
        scale = jnp.tile(settings.guidance[jnp.minimum(number_k, steps - 1)], samples)[:, None]
        logits = engine.mixed(logits, shape, mix, scale)
        if settings.bias is not None:
            logits = logits + settings.bias
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        tokens = draw.choose(logits, fold(rows.keys, number_k).reshape(-1), settings.filters)
        return jax.lax.dynamic_update_slice(drawn, tokens.reshape(samples, k), (0, first))

    # --- The prompt but for its last token, which is entered once for each of the first k codes.
    length = prompt.tokens.shape[1]
    passes = -(-steps // k)
    capacity = engine.prompt_slots(gpt, prompt) + passes * k + k
    cache = gpt.init_cache(count, capacity)
    if length > 1:
        output = gpt(prompt.first(length - 1), cache)
        assert output.cache is not None
        cache = output.cache
    elif prefix:
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
    drawn = choose(output.hidden, 0, jnp.zeros((samples, passes * k), jnp.int32))

    def body(i: jax.Array, carry: Any) -> Any:
        cache, drawn = carry
        last = jax.lax.dynamic_slice_in_dim(drawn, (i - 1) * k, k, axis=1) + shape.start
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

    _, drawn = jax.lax.fori_loop(1, passes, body, (cache, drawn))
    return drawn[:, :steps]


def _forget(cache: Any, count: int) -> Any:
    """The cache without its last tokens, which are written over."""
    return dataclasses.replace(cache, length=cache.length - count)
