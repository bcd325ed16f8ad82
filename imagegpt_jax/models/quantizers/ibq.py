"""Index backpropagation (IBQ, arXiv:2412.02692): every code of a learned codebook gets some gradient.

Shapes: N vectors, Z numbers in each, D depth, K codes of a group, I different indices.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from imagegpt_jax.models.quantizers import codebook as codebooks
from imagegpt_jax.models.quantizers.config import Codebook, Group, Kind, QuantizerConfig
from imagegpt_jax.parallel import sharding

# Indices by the greatest product, and what each was chosen for.
nearest = functools.partial(codebooks.nearest_each_depth, metric=codebooks.DOT)


def quantize(config: QuantizerConfig, codebook: Codebook, z_NZ: Float[Array, "N Z"]) -> Group:
    """zq is the one-hot choice of the greatest z . code, times the codes; its gradient is that of the one-hot for the
    codes, and that of the softmax for the choice. "index" is |zq - z|^2 with that gradient, beside VQ's two losses.
    """
    codebook_KZ = codebook()
    codes_ND, rests_NDZ = nearest(config, codebook, z_NZ)
    hard_NZ = sharding.constrain(jnp.take(codebook_KZ, codes_ND[:, 0], axis=0), ("batch", None))
    soft_NZ = codebooks.soft_codes(z_NZ, codebook_KZ, config.chunk_codes)
    zq_NZ = hard_NZ + (soft_NZ - lax.stop_gradient(soft_NZ))
    losses = {
        "index": jnp.mean(jnp.square(zq_NZ - z_NZ)),
        "commitment": jnp.mean(jnp.square(z_NZ - lax.stop_gradient(hard_NZ))),
        "codebook": jnp.mean(jnp.square(lax.stop_gradient(z_NZ) - hard_NZ)),
    }
    if config.entropy_weight:
        temperature = config.entropy_temperature
        losses["entropy"] = codebooks.entropy_loss(z_NZ, codebook_KZ, temperature, config.chunk_codes, codebooks.DOT)
    return Group(zq_NZ, codes_ND, rests_NDZ, losses)


IBQ = Kind(
    quantize=quantize,
    nearest=nearest,
    lookup=codebooks.lookup,
    init=codebooks.init,
    options=("l2_normalize", "entropy_weight", "revival_steps"),
)
