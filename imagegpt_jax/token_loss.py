"""Negative log-likelihood of tokens, without ever holding the logits of the whole vocabulary.

The vocabulary is scored in chunks, forward with a running log-sum-exp and backward again, as FlashAttention does along
its keys (arXiv:2205.14135) and Cut Cross-Entropy along a vocabulary (arXiv:2411.09009). Chunks run over ids rather than
positions so that the gradient of each part of the table is summed over the devices once.

Shapes: B batch, M positions, D model width, V vocabulary, C chunks, J ids of a chunk.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagegpt_jax import sharding
from imagegpt_jax.models import layers

LOGITS = ("batch", "length", "vocab")


def token_nll(
    hidden_BMD: Float[Array, "B M D"], table_VD: Float[Array, "V D"], targets_BM: Int[Array, "B M"], *, chunk: int
) -> Float[Array, "B M"]:
    """Negative log-likelihood in nats of each target under softmax(hidden . table).

    Args:
      hidden_BMD: final states.
      table_VD: output head, in the compute dtype.
      targets_BM: rows of the table.
      chunk: ids scored at a time: memory is B x M x chunk scores. A vocabulary that is no larger is scored at once.
    """
    vocab = table_VD.shape[0]
    if vocab <= chunk:
        logits_BMV = sharding.constrain(layers.score(hidden_BMD, table_VD), LOGITS)
        normaliser_BM = jax.nn.logsumexp(logits_BMV, axis=-1)
        return normaliser_BM - jnp.take_along_axis(logits_BMV, targets_BM[..., None], axis=-1)[..., 0]
    chunked: Any = _chunked_nll
    return chunked(hidden_BMD, table_VD, targets_BM, math.ceil(vocab / chunk))


def _cut(table_VD: jax.Array, chunks: int) -> tuple[jax.Array, jax.Array]:
    """Table -> its chunks [C, J, D] and the ids of their rows [C, J]; rows added to fill the last have id >= V.

    Where devices share the vocabulary, chunk c takes rows c, c + C, c + 2C, ...: a part of every device's rows.
    """
    vocab, parts = table_VD.shape[0], sharding.axis_parts("vocab")
    size = math.ceil(vocab / (chunks * parts)) * parts
    table_VD = jnp.pad(table_VD, ((0, chunks * size - vocab), (0, 0)))
    ids_V = jnp.arange(chunks * size)
    if parts > 1:
        return table_VD.reshape(size, chunks, -1).swapaxes(0, 1), ids_V.reshape(size, chunks).T
    return table_VD.reshape(chunks, size, -1), ids_V.reshape(chunks, size)


def _uncut(chunks_CJD: jax.Array, vocab: int) -> Float[Array, "V D"]:
    """Inverse of `_cut`."""
    if sharding.axis_parts("vocab") > 1:
        chunks_CJD = chunks_CJD.swapaxes(0, 1)
    return chunks_CJD.reshape(-1, chunks_CJD.shape[-1])[:vocab]


def _score(hidden_BMD: jax.Array, table_JD: jax.Array, ids_J: jax.Array, vocab: int) -> Float[Array, "B M J"]:
    logits_BMJ = sharding.constrain(layers.score(hidden_BMD, table_JD), LOGITS)
    return jnp.where(ids_J < vocab, logits_BMJ, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked_nll(hidden_BMD: jax.Array, table_VD: jax.Array, targets_BM: jax.Array, chunks: int) -> jax.Array:
    return _forward(hidden_BMD, table_VD, targets_BM, chunks)[0]


def _forward(hidden_BMD: jax.Array, table_VD: jax.Array, targets_BM: jax.Array, chunks: int) -> tuple[jax.Array, Any]:
    vocab = table_VD.shape[0]

    def body(carry, chunk):
        largest_BM, total_BM, target_BM = carry
        logits_BMJ = _score(hidden_BMD, *chunk, vocab)  # pyright: ignore[reportCallIssue]
        is_target_BMJ = chunk[1] == targets_BM[..., None]
        new_BM = jnp.maximum(largest_BM, logits_BMJ.max(axis=-1))
        total_BM = total_BM * jnp.exp(largest_BM - new_BM) + jnp.exp(logits_BMJ - new_BM[..., None]).sum(axis=-1)
        return (new_BM, total_BM, target_BM + jnp.where(is_target_BMJ, logits_BMJ, 0).sum(axis=-1)), None

    zeros_BM = jnp.zeros(targets_BM.shape, layers.wide(hidden_BMD.dtype))
    start = (jnp.full_like(zeros_BM, -jnp.inf), zeros_BM, zeros_BM)
    (largest_BM, total_BM, target_BM), _ = jax.lax.scan(body, start, _cut(table_VD, chunks))
    normaliser_BM = largest_BM + jnp.log(total_BM)
    return normaliser_BM - target_BM, (hidden_BMD, table_VD, targets_BM, normaliser_BM)


def _backward(chunks: int, saved: Any, gradient_BM: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """d nll / d logits = softmax - one-hot, a chunk at a time."""
    hidden_BMD, table_VD, targets_BM, normaliser_BM = saved
    vocab, wide = table_VD.shape[0], layers.wide(hidden_BMD.dtype)

    def body(d_hidden_BMD, chunk):
        table_JD, ids_J = chunk
        probability_BMJ = jnp.exp(_score(hidden_BMD, table_JD, ids_J, vocab) - normaliser_BM[..., None])
        is_target_BMJ = ids_J == targets_BM[..., None]
        d_logits_BMJ = jnp.where(is_target_BMJ, probability_BMJ - 1, probability_BMJ) * gradient_BM[..., None]
        d_logits_BMJ = d_logits_BMJ.astype(hidden_BMD.dtype)
        d_hidden_BMD += jnp.einsum("bmj,jd->bmd", d_logits_BMJ, table_JD, preferred_element_type=wide)
        d_table_JD = jnp.einsum("bmj,bmd->jd", d_logits_BMJ, hidden_BMD)
        return d_hidden_BMD, d_table_JD

    start = sharding.constrain(jnp.zeros(hidden_BMD.shape, wide), ("batch", "length", "embed"))
    d_hidden_BMD, d_chunks_CJD = jax.lax.scan(body, start, _cut(table_VD, chunks))
    return d_hidden_BMD.astype(hidden_BMD.dtype), _uncut(d_chunks_CJD, vocab).astype(table_VD.dtype), None


_chunked_nll.defvjp(_forward, _backward)
