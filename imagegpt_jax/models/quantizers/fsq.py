"""Finite scalar quantization (FSQ, arXiv:2309.15505): each number is bounded and rounded; there are no losses.

Shapes: N vectors, Z numbers in each, D depth, K codes of a group, I different indices.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.quantizers.config import Codebook, Group, Kind, Nearest, QuantizerConfig

# Keeps tanh away from the outermost rounding boundary.
EPS = 1e-3


def _basis(levels: tuple[int, ...]) -> np.ndarray:
    """What each number of a code counts in its index: the first varies fastest."""
    return np.cumprod([1, *levels[:-1]]).astype(np.int32)


def bound(z: Float[Array, "... Z"], levels: tuple[int, ...]) -> Float[Array, "... Z"]:
    """Bounds each number to an interval that holds `levels` integers (arXiv:2309.15505, appendix A.1).

    The published listing shifts even numbers of levels by tan(offset / half); so do we, so that indices agree.
    """
    levels_Z = np.asarray(levels)
    half_Z = (levels_Z - 1) * (1 - EPS) / 2
    offset_Z = np.where(levels_Z % 2, 0.0, 0.5)
    shift_Z = np.tan(offset_Z / half_Z)
    return jnp.tanh(z + shift_Z.astype(z.dtype)) * half_Z.astype(z.dtype) - offset_Z.astype(z.dtype)


def round_levels(z: Float[Array, "... Z"], levels: tuple[int, ...]) -> tuple[Float[Array, "... Z"], Int[Array, "..."]]:
    """Rounds bounded numbers; the gradient goes straight through the rounding, not through the bound.

    Returns:
      (codes in [-1, 1], their indices)
    """
    bounded = bound(z, levels)
    rounded = lax.stop_gradient(jnp.round(bounded))
    half_Z = np.asarray(levels) // 2
    index = jnp.sum((rounded.astype(jnp.int32) + half_Z) * _basis(levels), axis=-1).astype(jnp.int32)
    # bounded - sg(bounded) is exactly zero, so training decodes the very values that `lookup` gives.
    return (rounded + (bounded - lax.stop_gradient(bounded))) / half_Z.astype(z.dtype), index


def check(config: QuantizerConfig) -> None:
    """Raises UserError if levels do not fit the numbers of a group and its codes."""
    if len(config.levels) != config.group_dim or min(config.levels, default=0) < 2:
        raise UserError(
            f"kind='fsq' needs levels of 2 or more for each of the {config.group_dim} numbers of a group, not"
            f" {config.levels}: set levels, and code_dim = groups x their number."
        )
    product = math.prod(config.levels)
    if config.num_codes != product:
        raise UserError(
            f"levels={config.levels} have {product} codes, and num_codes={config.num_codes}: set num_codes={product}."
        )


def nearest(config: QuantizerConfig, codebook: Codebook, z_NZ: Float[Array, "N Z"]) -> Nearest:
    """Indices of the rounded vectors, and the vectors."""
    z_NZ = lax.stop_gradient(z_NZ)
    return round_levels(z_NZ, config.levels)[1][:, None], z_NZ[:, None]


def quantize(config: QuantizerConfig, codebook: Codebook, z_NZ: Float[Array, "N Z"]) -> Group:
    """Rounds."""
    zq_NZ, codes_N = round_levels(z_NZ, config.levels)
    return Group(zq_NZ, codes_N[:, None], z_NZ[:, None], {})


def lookup(config: QuantizerConfig, codebook: Codebook, ids: Int[Array, "..."]) -> Float[Array, "... Z"]:
    """Indices, of any group -> codes in [-1, 1]."""
    levels_Z = np.asarray(config.levels)
    half_Z = levels_Z // 2
    digits = (ids % config.num_codes)[..., None] // _basis(config.levels) % levels_Z
    return (digits - half_Z).astype(jnp.float32) / half_Z.astype(jnp.float32)


FSQ = Kind(quantize=quantize, nearest=nearest, lookup=lookup, check=check, options=("levels",))
