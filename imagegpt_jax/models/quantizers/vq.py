"""Vector quantization: the nearest code of a learned codebook (VQ-VAE, arXiv:1711.00937), one or several in a row.

Shapes: N vectors, Z numbers in each, D depth, K codes of a group, I different indices.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.quantizers import codebook as codebooks
from imagegpt_jax.models.quantizers.config import Codebook, Group, Kind, QuantizerConfig
from imagegpt_jax.parallel import sharding


def check(config: QuantizerConfig) -> None:
    """Raises UserError for depths on the unit sphere."""
    if config.depth > 1 and config.l2_normalize:
        raise UserError(f"depth={config.depth} needs l2_normalize=False: what is left over has no fixed length.")


# Indices by the least distance, and what each was chosen for.
nearest = functools.partial(codebooks.nearest_each_depth, metric=codebooks.EUCLIDEAN)


def quantize(config: QuantizerConfig, codebook: Codebook, z_NZ: Float[Array, "N Z"]) -> Group:
    """Nearest codes, one after another for what is left over.

    Losses follow VQ-VAE (arXiv:1711.00937, equation 3), as means over vectors and dimensions, summed over depths
    (arXiv:2203.01941, equation 8).
    """
    codebook_KZ = codebook()
    codes_ND, rests_NDZ = nearest(config, codebook, z_NZ)
    parts = [
        sharding.constrain(jnp.take(codebook_KZ, codes_ND[:, d], axis=0), ("batch", None)) for d in range(config.depth)
    ]
    zq_NZ, commitment, learned = parts[0], 0.0, 0.0
    for level, part_NZ in enumerate(parts):
        zq_NZ = zq_NZ if level == 0 else zq_NZ + part_NZ
        commitment += jnp.mean(jnp.square(z_NZ - lax.stop_gradient(zq_NZ)))
        learned += jnp.mean(jnp.square(lax.stop_gradient(rests_NDZ[:, level]) - part_NZ))
    losses = {"commitment": jnp.asarray(commitment)}
    if config.codebook_update == "gradient":
        losses["codebook"] = jnp.asarray(learned)
    if config.entropy_weight:
        losses["entropy"] = codebooks.entropy_loss(z_NZ, codebook_KZ, config.entropy_temperature, config.chunk_codes)
    return Group(codebooks.straight_through(zq_NZ, z_NZ), codes_ND, rests_NDZ, losses)


VQ = Kind(
    quantize=quantize,
    nearest=nearest,
    lookup=codebooks.lookup,
    init=codebooks.init,
    check=check,
    options=("depth", "l2_normalize", "codebook_update", "entropy_weight", "revival_steps"),
)
