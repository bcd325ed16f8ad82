"""Negative log-likelihood of tokens, without ever holding the logits of the whole vocabulary.

The vocabulary is scored in chunks, forward with a running log-sum-exp and backward again, as FlashAttention does along
its keys (arXiv:2205.14135) and Cut Cross-Entropy along a vocabulary (arXiv:2411.09009). Chunks run over ids rather than
positions so that the gradient of each part of the table is summed over the devices once.

Shapes: B batch, M positions, D model width, V vocabulary, C chunks, T parts that the mesh cuts the vocabulary into, J
ids of one part in a chunk.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagegpt_jax.models import layers
from imagegpt_jax.parallel import manual_collectives, sharding

LOGITS = ("batch", "length", "vocab")


def token_nll(
    hidden_BMD: Float[Array, "B M D"], table_VD: Float[Array, "V D"], targets_BM: Int[Array, "B M"], *, chunk: int
) -> Float[Array, "B M"]:
    """Negative log-likelihood in nats of each target, a row of the table, under softmax(hidden . table).

    Ids are scored `chunk` at a time: memory is B x M x chunk scores. A vocabulary that is no larger is scored at once.
    """
    vocab = table_VD.shape[0]
    if vocab <= chunk:
        logits_BMV = sharding.constrain(layers.score(hidden_BMD, table_VD), LOGITS)
        normaliser_BM = jax.nn.logsumexp(logits_BMV, axis=-1)
        return normaliser_BM - jnp.take_along_axis(logits_BMV, targets_BM[..., None], axis=-1)[..., 0]
    chunked: Any = _chunked_nll
    return chunked(hidden_BMD, table_VD, targets_BM, math.ceil(vocab / chunk))


def _cut(table_VD: jax.Array, chunks: int) -> tuple[jax.Array, jax.Array]:
    """Table -> its chunks [C, T, J, D] and the ids of their rows [C, T, J]; rows added to fill the last have id >= V.

    A chunk has J rows of each of the T parts of the vocabulary, which are the devices' own where those share it.
    """
    vocab, parts = table_VD.shape[0], sharding.axis_parts("vocab")
    size = math.ceil(vocab / (chunks * parts))
    table_VD = jnp.pad(table_VD, ((0, chunks * parts * size - vocab), (0, 0)))
    ids_V = jnp.arange(chunks * parts * size)
    shape = parts, chunks, size
    return table_VD.reshape(*shape, -1).swapaxes(0, 1), ids_V.reshape(shape).swapaxes(0, 1)


def _uncut(chunks_CTJD: jax.Array, vocab: int) -> Float[Array, "V D"]:
    """Inverse of `_cut`."""
    return chunks_CTJD.swapaxes(0, 1).reshape(-1, chunks_CTJD.shape[-1])[:vocab]


def _score(hidden_BMD: jax.Array, table_TJD: jax.Array, ids_TJ: jax.Array, vocab: int) -> Float[Array, "B M T J"]:
    logits = sharding.constrain(layers.score(hidden_BMD, table_TJD.reshape(-1, table_TJD.shape[-1])), LOGITS)
    logits_BMTJ = logits.reshape(*hidden_BMD.shape[:-1], *ids_TJ.shape)
    return jnp.where(ids_TJ < vocab, logits_BMTJ, _least(logits_BMTJ.dtype))


def _least(dtype: Any) -> jax.Array:
    """A score that counts for nothing beside any other, and is finite: a part may have no other."""
    return jnp.asarray(jnp.finfo(dtype).min, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked_nll(hidden_BMD: jax.Array, table_VD: jax.Array, targets_BM: jax.Array, chunks: int) -> jax.Array:
    return _forward(hidden_BMD, table_VD, targets_BM, chunks)[0]


def _forward(hidden_BMD: jax.Array, table_VD: jax.Array, targets_BM: jax.Array, chunks: int) -> tuple[jax.Array, Any]:
    vocab, wide = table_VD.shape[0], layers.accumulation_dtype(hidden_BMD.dtype)

    def body(carry, chunk):
        largest_BMT, total_BMT, target_BMT = carry
        logits_BMTJ = _score(hidden_BMD, *chunk, vocab)  # pyright: ignore[reportCallIssue]
        is_target_BMTJ = chunk[1] == targets_BM[..., None, None]
        new_BMT = jnp.maximum(largest_BMT, logits_BMTJ.max(axis=-1))
        total_BMT = total_BMT * jnp.exp(largest_BMT - new_BMT) + jnp.exp(logits_BMTJ - new_BMT[..., None]).sum(axis=-1)
        return (new_BMT, total_BMT, target_BMT + jnp.where(is_target_BMTJ, logits_BMTJ, 0).sum(axis=-1)), None

    chunks_CTJD = _cut(table_VD, chunks)
    zeros_BMT = sharding.constrain(jnp.zeros((*targets_BM.shape, chunks_CTJD[1].shape[1]), wide), LOGITS)
    start = (jnp.full_like(zeros_BMT, _least(wide)), zeros_BMT, zeros_BMT)
    (largest_BMT, total_BMT, target_BMT), _ = jax.lax.scan(body, start, chunks_CTJD)
    normaliser_BM = jax.nn.logsumexp(largest_BMT + jnp.log(total_BMT), axis=-1)
    return normaliser_BM - target_BMT.sum(axis=-1), (hidden_BMD, table_VD, targets_BM, normaliser_BM)


def _backward(chunks: int, saved: Any, gradient_BM: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """d nll / d logits = softmax - one-hot, a chunk at a time; the parts of d hidden are summed once, at the end."""
    hidden_BMD, table_VD, targets_BM, normaliser_BM = saved
    vocab, wide = table_VD.shape[0], layers.accumulation_dtype(hidden_BMD.dtype)

    def body(d_hidden_TBMD, chunk):
        table_TJD, ids_TJ = chunk
        probability_BMTJ = jnp.exp(_score(hidden_BMD, table_TJD, ids_TJ, vocab) - normaliser_BM[..., None, None])
        is_target_BMTJ = ids_TJ == targets_BM[..., None, None]
        d_logits_BMTJ = jnp.where(is_target_BMTJ, probability_BMTJ - 1, probability_BMTJ)
        d_logits_BMTJ = (d_logits_BMTJ * gradient_BM[..., None, None]).astype(hidden_BMD.dtype)
        d_hidden_TBMD += jnp.einsum("bmtj,tjd->tbmd", d_logits_BMTJ, table_TJD, preferred_element_type=wide)
        return d_hidden_TBMD, jnp.einsum("bmtj,bmd->tjd", d_logits_BMTJ, hidden_BMD)

    chunks_CTJD = _cut(table_VD, chunks)
    zeros_TBMD = jnp.zeros((chunks_CTJD[1].shape[1], *hidden_BMD.shape), wide)
    start = sharding.constrain(zeros_TBMD, ("vocab", "batch", "length", "embed"))
    d_hidden_TBMD, d_chunks_CTJD = jax.lax.scan(body, start, chunks_CTJD)
    d_hidden_BMD = manual_collectives.sum_vocabulary(d_hidden_TBMD.astype(hidden_BMD.dtype))
    return d_hidden_BMD, _uncut(d_chunks_CTJD, vocab).astype(table_VD.dtype), None


_chunked_nll.defvjp(_forward, _backward)
