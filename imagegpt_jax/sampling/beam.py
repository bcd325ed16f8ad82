"""Beam search: the likeliest sequences, instead of sampled ones. For captions, and for short grids of codes.

Shapes: B samples, K beams, G prompts of a sample, R = B x rows of a sample, N tokens, V ids that may be drawn.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt import GPT
from imagegpt_jax.parallel import padding
from imagegpt_jax.sampling import batching, engine
from imagegpt_jax.sampling.decode_weights import score
from imagegpt_jax.sampling.settings import Sampling

NO_END = -1  # of sequences that are all as long as they can be


@dataclasses.dataclass(frozen=True)
class Beams:
    """The beams of each sample, best first.

    Attributes:
      tokens: int32 [B, K, N]; what follows an end repeats it.
      log_likelihood: float32 [B, K], in nats, with the end.
    """

    tokens: np.ndarray
    log_likelihood: np.ndarray


def search(
    gpt: GPT,
    job: batching.Job,
    sampling: Sampling,
    *,
    beams: int,
    end: int = NO_END,
    length_penalty: float = 0.0,
    batch_size: int = 1,
) -> Beams:
    """Keeps the K likeliest beginnings of each sample, token by token. Exact if K is at least V^(N - 1).

    Args:
      gpt: the decoder, as trained or from `batching.place`.
      job: what to decode; given tokens are not regarded.
      sampling: of its settings guidance alone.
      beams: K.
      end: token after which a sequence is over.
      length_penalty: alpha of arXiv:1609.08144: final beams are ordered by log-likelihood / ((5 + length) / 6)^alpha.
      batch_size: samples that are searched for together.

    Raises:
      UserError: for fewer than one beam, or more than there are tokens.
    """
    if not 1 <= beams <= job.size:
        raise UserError(f"beams={beams} must lie in 1 to {job.size}, the number of tokens to choose among.")
    gpt = batching.place(gpt, sampling.weights)
    shape, settings = batching.plan(job, sampling)
    keys = batching.sample_keys(0, np.arange(job.total))
    all_tokens, all_scores = [], []
    for part, samples in padding.padded_batches(job.total, batch_size):
        rows = batching.rows_of(job, keys, samples[None])
        tokens_BKN, scores_BK = _search(gpt, rows, settings, shape=shape, beams=beams, end=end)
        count = part.stop - part.start
        all_tokens.append(np.asarray(tokens_BKN)[:count])
        all_scores.append(np.asarray(scores_BK)[:count])
    tokens, scores = np.concatenate(all_tokens), np.concatenate(all_scores)
    length_BK = tokens.shape[2] - np.maximum((tokens == end).sum(2) - 1, 0)
    order_BK = np.argsort(-scores / ((5 + length_BK) / 6) ** length_penalty, axis=1, kind="stable")
    return Beams(np.take_along_axis(tokens, order_BK[..., None], 1), np.take_along_axis(scores, order_BK, 1))


@functools.partial(jax.jit, static_argnames=("shape", "beams", "end"))
def _search(
    gpt: GPT, rows: engine.Rows, settings: engine.Settings, *, shape: engine.Shape, beams: int, end: int
) -> tuple[Int[Array, "B K N"], Float[Array, "B K"]]:
    prompt, steps, samples = rows.prompt, settings.offsets.shape[0], rows.keys.shape[0]
    groups = shape.prompts + shape.guided
    hidden_RD, cache = engine.prefill(gpt, prompt, engine.prompt_slots(gpt, prompt) + steps - 1)
    table_VD = gpt.output_table(shape.start, shape.size)

    def repeated(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0) if x.ndim else x, tree)

    hidden_RD, cache, prompt, mix = repeated((hidden_RD, cache, prompt, rows.mix))
    base_R3 = prompt.positions[:, -1] + 1

    def extend(i: Any, hidden_RD: jax.Array, tokens_BKN: jax.Array, scores_BK: jax.Array) -> tuple[jax.Array, ...]:
        logits_CV = engine.mixed(score(hidden_RD, table_VD), shape, mix, settings.guidance[i], settings.bias)
        log_probs_BKV = jax.nn.log_softmax(logits_CV, axis=-1).reshape(samples, beams, shape.size)
        over_BK = (jnp.any(tokens_BKN == end, axis=2) & (i > 0)) if end != NO_END else jnp.zeros_like(scores_BK, bool)
        stay_V = jnp.where(jnp.arange(shape.size) == end, 0.0, -jnp.inf)
        log_probs_BKV = jnp.where(over_BK[..., None], stay_V, log_probs_BKV)
        total_BX = (scores_BK[..., None] + log_probs_BKV).reshape(samples, -1)
        scores_BK, chosen_BK = jax.lax.top_k(total_BX, beams)
        parent_BK, token_BK = jnp.divmod(chosen_BK, shape.size)
        tokens_BKN = jnp.take_along_axis(tokens_BKN, parent_BK[..., None], axis=1)
        tokens_BKN = jax.lax.dynamic_update_index_in_dim(tokens_BKN, token_BK, i, axis=2)
        return tokens_BKN, scores_BK, parent_BK

    def body(i: jax.Array, carry: Any) -> Any:
        cache, tokens_BKN, scores_BK = carry
        last_BK = jax.lax.dynamic_index_in_dim(tokens_BKN, i - 1, axis=2, keepdims=False) + shape.start
        hidden_RD, cache = engine.step(
            gpt,
            cache,
            jnp.tile(last_BK.reshape(-1), groups),
            base_R3 + settings.offsets[i - 1],
            target_positions_R3=base_R3 + settings.offsets[i] if gpt.config.target_positions else None,
            prompt=prompt,
        )
        tokens_BKN, scores_BK, parent_BK = extend(i, hidden_RD, tokens_BKN, scores_BK)
        # Every beam goes on with the cache of the one that it came from, in each group of rows.
        group_G11 = jnp.arange(groups)[:, None, None]
        row_R = ((group_G11 * samples + jnp.arange(samples)[:, None]) * beams + parent_BK).reshape(-1)
        cache = jax.tree.map(lambda x: x[row_R] if x.ndim else x, cache)
        return cache, tokens_BKN, scores_BK

    tokens_BKN = jnp.full((samples, beams, steps), NO_END - 1, jnp.int32)
    scores_BK = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (samples, beams))
    tokens_BKN, scores_BK, _ = extend(0, hidden_RD, tokens_BKN, scores_BK)
    _, tokens_BKN, scores_BK = jax.lax.fori_loop(1, steps, body, (cache, tokens_BKN, scores_BK))
    return tokens_BKN, scores_BK
