"""Codes without a table: finite scalar quantization (FSQ), and signs (LFQ, and on the unit sphere BSQ).

Shapes: N vectors, Z numbers in each, K codes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# FSQ: keeps tanh away from the outermost rounding boundary.
EPS = 1e-3


def _basis(levels: tuple[int, ...]) -> np.ndarray:
    """What each number of a code counts in its index: the first varies fastest."""
    return np.cumprod([1, *levels[:-1]]).astype(np.int32)


def fsq_bound(z: Float[Array, "... Z"], levels: tuple[int, ...]) -> Float[Array, "... Z"]:
    """Bounds each number to an interval that holds `levels` integers (arXiv:2309.15505, appendix A.1).

    The published listing shifts even numbers of levels by tan(offset / half); so do we, so that indices agree.
    """
    levels_Z = np.asarray(levels)
    half_Z = (levels_Z - 1) * (1 - EPS) / 2
    offset_Z = np.where(levels_Z % 2, 0.0, 0.5)
    shift_Z = np.tan(offset_Z / half_Z)
    return jnp.tanh(z + shift_Z.astype(z.dtype)) * half_Z.astype(z.dtype) - offset_Z.astype(z.dtype)


def fsq_round(z: Float[Array, "... Z"], levels: tuple[int, ...]) -> tuple[Float[Array, "... Z"], Int[Array, "..."]]:
    """FSQ: rounds bounded numbers; the gradient goes straight through the rounding, not through the bound.

    Returns:
      (codes in [-1, 1], their indices)
    """
    bounded = fsq_bound(z, levels)
    rounded = lax.stop_gradient(jnp.round(bounded))
    half_Z = np.asarray(levels) // 2
    index = jnp.sum((rounded.astype(jnp.int32) + half_Z) * _basis(levels), axis=-1).astype(jnp.int32)
    # bounded - sg(bounded) is exactly zero, so training decodes the very values that `fsq_lookup` gives.
    return (rounded + (bounded - lax.stop_gradient(bounded))) / half_Z.astype(z.dtype), index


def fsq_lookup(index: Int[Array, "..."], levels: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "... Z"]:
    """Indices -> FSQ's codes in [-1, 1]."""
    half_Z = np.asarray(levels) // 2
    digits = index[..., None] // _basis(levels) % np.asarray(levels)
    return (digits - half_Z).astype(dtype) / half_Z.astype(dtype)


def sign_value(dim: int, normalize: bool) -> float:
    """The size of each number of a code: 1 for LFQ; for BSQ 1 / sqrt(Z), on the unit sphere (arXiv:2406.07548)."""
    return dim**-0.5 if normalize else 1.0


def sign_codes(z: Float[Array, "... Z"], value: float) -> tuple[Float[Array, "... Z"], Int[Array, "..."]]:
    """LFQ: the sign of each number, and the index whose bit i is set where number i is positive (arXiv:2310.05737).

    Returns:
      (codes of +-value, without gradient, and their indices)
    """
    positive = z > 0
    index = jnp.sum(positive.astype(jnp.int32) << np.arange(z.shape[-1], dtype=np.int32), axis=-1)
    return jnp.where(positive, value, -value).astype(z.dtype), index.astype(jnp.int32)


def sign_lookup(index: Int[Array, "..."], dim: int, value: float, dtype: jnp.dtype) -> Float[Array, "... Z"]:
    """Indices -> codes of +-value."""
    bits = index[..., None] >> np.arange(dim, dtype=np.int32) & 1
    return jnp.where(bits == 1, value, -value).astype(dtype)


def sign_entropy_loss(z_NZ: Float[Array, "N Z"], value: float, temperature: float) -> Float[Array, ""]:
    """`codebook.entropy_loss` over all 2^Z codes of signs, exactly, without an array of N x 2^Z (or 2^Z x Z) elements.

    p(code | z) is a product over bits, each positive with probability sigmoid(4 value z / temperature). So its entropy
    is a sum over bits; and its mean over the batch is a matrix product of two tables of 2^(Z / 2) probabilities, of one
    half of the bits and of the other. Equation 5 of arXiv:2310.05737, in nats.
    """
    logits_NZ = 4 * value * z_NZ / temperature
    size_NZ = jnp.abs(logits_NZ)
    sample = jnp.mean(jnp.sum(jax.nn.softplus(-size_NZ) + size_NZ * jax.nn.sigmoid(-size_NZ), axis=-1))
    low_NI, high_NJ = (_products(x) for x in jnp.split(logits_NZ, [math.ceil(z_NZ.shape[1] / 2)], axis=1))
    mean_JI = jnp.einsum("nj,ni->ji", high_NJ, low_NI, precision=lax.Precision.HIGHEST) / z_NZ.shape[0]
    batch = -jnp.sum(mean_JI * jnp.log(jnp.maximum(mean_JI, 1e-30)))
    return sample - batch


def _products(logits_NZ: Float[Array, "N Z"]) -> Float[Array, "N 2**Z"]:
    """Probability of each pattern of bits that are on with these logits."""
    dim = logits_NZ.shape[1]
    bits_KZ = (np.arange(2**dim)[:, None] >> np.arange(dim) & 1).astype(logits_NZ.dtype)
    log_on_NZ, log_off_NZ = jax.nn.log_sigmoid(logits_NZ), jax.nn.log_sigmoid(-logits_NZ)
    exact = lax.Precision.HIGHEST
    return jnp.exp(
        jnp.matmul(log_on_NZ, bits_KZ.T, precision=exact) + jnp.matmul(log_off_NZ, 1 - bits_KZ.T, precision=exact)
    )
