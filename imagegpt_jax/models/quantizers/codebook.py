"""Learned codes, and search among them in chunks: the nearest code, softmax averages and entropies over all.

A codebook lies in pieces on the devices of the logical axis "codes"; each compares the vectors with its own codes.
Numbers are float32, or float64 if the vectors or the codebook are. No array has N x K elements, only N x chunk.

Shapes: N vectors, Z code dimension, K codes, C chunks of J codes, S pieces.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from imagegpt_jax.models.quantizers.config import Codebook, Nearest, QuantizerConfig
from imagegpt_jax.parallel import sharding

# How a vector and a code are compared; either grows with their likeness.
EUCLIDEAN, DOT = "euclidean", "dot"


def l2_normalize(x: Float[Array, "... Z"]) -> Float[Array, "... Z"]:
    """x / |x| over the last axis, with a gradient of zero instead of nan at x = 0."""
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _similarity(z_NZ: Float[Array, "N Z"], codebook_JZ: Float[Array, "J Z"], metric: str) -> Float[Array, "N J"]:
    """z . code, or -|z - code|^2 + |z|^2: the negative squared distance up to a constant per vector."""
    # Codes can be close together: the bfloat16 passes of a TPU's default precision would choose wrong ones.
    dot_NJ = jnp.einsum("nz,jz->nj", z_NZ, codebook_JZ, precision=lax.Precision.HIGHEST)
    return dot_NJ if metric == DOT else 2 * dot_NJ - jnp.sum(jnp.square(codebook_JZ), axis=-1)


def _chunks(codebook_KZ: Float[Array, "K Z"], chunk: int) -> Float[Array, "C J Z"]:
    """Cuts a codebook into chunks of `chunk` codes; code k is row k // C of chunk k % C.

    Every C-th code, not J neighbours: a device that holds a piece of the codebook then has a piece of every chunk.
    """
    K, Z = codebook_KZ.shape
    C = max(1, K // chunk)
    return sharding.constrain(codebook_KZ.reshape(K // C, C, Z).swapaxes(0, 1), (None, "codes", None))


def _nearest_of(z_NZ: Float[Array, "N Z"], chunk_JZ: Float[Array, "J Z"], metric: str) -> tuple[Array, Int[Array, "N"]]:
    """Greatest similarity of each vector, and the row that has it, the first of equals."""
    N, J = z_NZ.shape[0], chunk_JZ.shape[0]
    S = sharding.axis_parts("codes")
    S = S if J % S == 0 else 1
    # Each piece finds its own best; only these [N, S] travel.
    similarity_NSJ = _similarity(z_NZ, chunk_JZ, metric).reshape(N, S, J // S)
    similarity_NSJ = sharding.constrain(similarity_NSJ, ("batch", "codes", None))
    row_NS = jnp.argmax(similarity_NSJ, axis=-1).astype(jnp.int32)
    value_NS = jnp.max(similarity_NSJ, axis=-1)
    row_NS, value_NS = (sharding.constrain(x, ("batch", None)) for x in (row_NS, value_NS))
    piece_N1 = jnp.argmax(value_NS, axis=-1, keepdims=True).astype(jnp.int32)
    row_N1 = piece_N1 * (J // S) + jnp.take_along_axis(row_NS, piece_N1, axis=-1)
    return jnp.max(value_NS, axis=-1), row_N1[:, 0]


def nearest_codes(
    z_NZ: Float[Array, "N Z"], codebook_KZ: Float[Array, "K Z"], chunk: int, metric: str = EUCLIDEAN
) -> Int[Array, "N"]:
    """Index of the code at the least distance (or of the greatest product, with DOT), the first of equals.

    `chunk` codes are compared at a time.
    """
    chunks_CJZ = _chunks(codebook_KZ, chunk)
    C, N = chunks_CJZ.shape[0], z_NZ.shape[0]
    if C == 1:
        return _nearest_of(z_NZ, chunks_CJZ[0], metric)[1]

    def body(best, chunk):
        offset, chunk_JZ = chunk
        value_N, row_N = _nearest_of(z_NZ, chunk_JZ, metric)
        code_N = row_N * C + offset
        better_N = (value_N > best[0]) | ((value_N == best[0]) & (code_N < best[1]))
        return (jnp.where(better_N, value_N, best[0]), jnp.where(better_N, code_N, best[1])), None

    start = jnp.full(N, -jnp.inf, jnp.result_type(z_NZ, codebook_KZ)), jnp.zeros(N, jnp.int32)
    best, _ = lax.scan(body, start, (jnp.arange(C, dtype=jnp.int32), chunks_CJZ))
    return best[1]


def _normaliser(
    z_NZ: Float[Array, "N Z"], chunks_CJZ: Float[Array, "C J Z"], temperature: float, metric: str
) -> Float[Array, "N"]:
    """Log of the sum over all codes of exp(similarity / temperature)."""

    def body(total_N, chunk_JZ):
        logits_NJ = _similarity(z_NZ, chunk_JZ, metric) / temperature
        return jnp.logaddexp(total_N, jax.nn.logsumexp(logits_NJ, axis=-1)), None

    # Recomputed in the backward pass: otherwise the scan would keep every chunk's [N, J], which is [N, K] after all.
    start_N = jnp.full(z_NZ.shape[0], -jnp.inf, jnp.result_type(z_NZ, chunks_CJZ))
    return lax.scan(jax.checkpoint(body), start_N, chunks_CJZ)[0]


def entropy_loss(
    z_NZ: Float[Array, "N Z"], codebook_KZ: Float[Array, "K Z"], temperature: float, chunk: int, metric: str = EUCLIDEAN
) -> Float[Array, ""]:
    """Mean entropy of p(code | z) minus the entropy of the mean over the batch, in nats.

    p is the softmax of -|z - code|^2 / temperature (of z . code / temperature with DOT). Low means that every vector is
    sure of its code while the batch uses all of them. As in MaskGIT's VQ and LFQ (MAGVIT-v2, arXiv:2310.05737,
    equation 5).
    """
    chunks_CJZ = _chunks(codebook_KZ, chunk)
    normaliser_N = _normaliser(z_NZ, chunks_CJZ, temperature, metric)

    def entropies(carry, chunk_JZ):
        log_p_NJ = _similarity(z_NZ, chunk_JZ, metric) / temperature - normaliser_N[:, None]
        p_NJ = jnp.exp(log_p_NJ)
        mean_J = jnp.mean(p_NJ, axis=0)
        sample = -jnp.mean(jnp.sum(p_NJ * log_p_NJ, axis=-1))
        batch = -jnp.sum(mean_J * jnp.log(jnp.maximum(mean_J, 1e-30)))
        return carry + sample - batch, None

    loss, _ = lax.scan(jax.checkpoint(entropies), jnp.zeros((), normaliser_N.dtype), chunks_CJZ)
    return loss


def soft_codes(z_NZ: Float[Array, "N Z"], codebook_KZ: Float[Array, "K Z"], chunk: int) -> Float[Array, "N Z"]:
    """Mean of the codes under the softmax of z . code; its gradient goes through the probabilities alone."""
    chunks_CJZ = _chunks(codebook_KZ, chunk)
    normaliser_N = _normaliser(z_NZ, chunks_CJZ, 1.0, DOT)

    def body(total_NZ, chunk_JZ):
        p_NJ = jnp.exp(_similarity(z_NZ, chunk_JZ, DOT) - normaliser_N[:, None])
        return total_NZ + p_NJ @ lax.stop_gradient(chunk_JZ), None

    return lax.scan(jax.checkpoint(body), jnp.zeros(z_NZ.shape, normaliser_N.dtype), chunks_CJZ)[0]


# -------------------------------------------------------------------------------------- parts of kinds with a codebook


def init(config: QuantizerConfig, param_dtype: Any, key: jax.Array) -> Float[Array, "I Z"]:
    """Uniform codes, on the unit sphere if the config says so."""
    shape = (config.num_ids, config.group_dim)
    codebook_IZ = jax.random.uniform(key, shape, param_dtype, -1 / config.num_codes, 1 / config.num_codes)
    return l2_normalize(codebook_IZ) if config.l2_normalize else codebook_IZ


def lookup(config: QuantizerConfig, codebook: Codebook, ids: Int[Array, "..."]) -> Float[Array, "... Z"]:
    """Indices -> codes."""
    return jnp.take(codebook(), ids, axis=0)


def nearest_each_depth(config: QuantizerConfig, codebook: Codebook, z_NZ: Float[Array, "N Z"], metric: str) -> Nearest:
    """The nearest codes, one after another for what is left over, and what each was chosen for; without gradient."""
    codebook_KZ, rest_NZ = lax.stop_gradient(codebook()), lax.stop_gradient(z_NZ)
    codes, rests = [], []
    for level in range(config.depth):
        if level:
            rest_NZ = rest_NZ - jnp.take(codebook_KZ, codes[-1], axis=0)
        rests.append(rest_NZ)
        codes.append(nearest_codes(rest_NZ, codebook_KZ, config.chunk_codes, metric))
    return jnp.stack(codes, axis=1), jnp.stack(rests, axis=1)


def straight_through(zq_NZ: Float[Array, "N Z"], z_NZ: Float[Array, "N Z"]) -> Float[Array, "N Z"]:
    """The values of `zq` with the gradient of `z`."""
    # z - sg(z) is exactly zero, so training decodes the very values that `lookup` gives.
    return lax.stop_gradient(zq_NZ) + (z_NZ - lax.stop_gradient(z_NZ))
