"""Signs as codes: lookup-free quantization (LFQ, arXiv:2310.05737), and on the unit sphere BSQ (arXiv:2406.07548).

Shapes: N vectors, Z numbers in each, D depth, K codes of a group, I different indices.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.quantizers.codebook import straight_through
from imagegpt_jax.models.quantizers.config import Codebook, Group, Kind, Nearest, QuantizerConfig


def check(config: QuantizerConfig) -> None:
    """Raises UserError if there is not one code for each pattern of signs."""
    dim = config.group_dim
    if dim > 30 or config.num_codes != 2**dim:
        raise UserError(
            f"kind='lfq' has one bit for each of the {dim} numbers of a group: set num_codes={2 ** min(dim, 30)} (it is"
            f" {config.num_codes}), or another code_dim."
        )


def code_value(config: QuantizerConfig) -> float:
    """The size of each number of a code: 1 for LFQ; for BSQ 1 / sqrt(Z), on the unit sphere."""
    return config.group_dim**-0.5 if config.l2_normalize else 1.0


def sign_codes(z: Float[Array, "... Z"], value: float) -> tuple[Float[Array, "... Z"], Int[Array, "..."]]:
    """LFQ: the sign of each number, and the index whose bit i is set where number i is positive (arXiv:2310.05737).

    Returns:
      (codes of +-value, without gradient, and their indices)
    """
    positive = z > 0
    index = jnp.sum(positive.astype(jnp.int32) << np.arange(z.shape[-1], dtype=np.int32), axis=-1)
    return jnp.where(positive, value, -value).astype(z.dtype), index.astype(jnp.int32)


def nearest(config: QuantizerConfig, codebook: Codebook, z_NZ: Float[Array, "N Z"]) -> Nearest:
    """Indices of the signs, and the vectors."""
    z_NZ = lax.stop_gradient(z_NZ)
    return sign_codes(z_NZ, 1.0)[1][:, None], z_NZ[:, None]


def quantize(config: QuantizerConfig, codebook: Codebook, z_NZ: Float[Array, "N Z"]) -> Group:
    """Signs, with the commitment loss and the entropy loss of the paper's equation 5."""
    value = code_value(config)
    zq_NZ, codes_N = sign_codes(lax.stop_gradient(z_NZ), value)
    losses = {"commitment": jnp.mean(jnp.square(z_NZ - zq_NZ))}
    if config.entropy_weight:
        losses["entropy"] = entropy_loss(z_NZ, value, config.entropy_temperature)
    return Group(straight_through(zq_NZ, z_NZ), codes_N[:, None], z_NZ[:, None], losses)


def lookup(config: QuantizerConfig, codebook: Codebook, ids: Int[Array, "..."]) -> Float[Array, "... Z"]:
    """Indices, of any group -> codes of +-value."""
    bits = (ids % config.num_codes)[..., None] >> np.arange(config.group_dim, dtype=np.int32) & 1
    value = code_value(config)
    return jnp.where(bits == 1, value, -value).astype(jnp.float32)


def entropy_loss(z_NZ: Float[Array, "N Z"], value: float, temperature: float) -> Float[Array, ""]:
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


LFQ = Kind(quantize=quantize, nearest=nearest, lookup=lookup, check=check, options=("l2_normalize", "entropy_weight"))
