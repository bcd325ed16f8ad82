"""Image pairs compared pixel by pixel: SSIM and MS-SSIM.

Shapes: B batch, H W pixels, C channels.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

WINDOW = 11  # side of the Gaussian window, in pixels
_SIGMA = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM's scales, from fine to coarse


def _smooth(x_BHWC: Array) -> Array:
    """Gaussian window over what it fits into."""
    places = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(places**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (1, 2):
        length = x_BHWC.shape[axis] - WINDOW + 1
        x_BHWC = sum(  # type: ignore[assignment]
            float(w) * lax.slice_in_dim(x_BHWC, i, i + length, axis=axis) for i, w in enumerate(weights)
        )
    return x_BHWC


def _terms(a_BHWC: Array, b_BHWC: Array) -> tuple[Array, Array]:
    """(SSIM, its part of contrast and structure), means over positions, [B, C]."""
    mean_a, mean_b = _smooth(a_BHWC), _smooth(b_BHWC)
    product = mean_a * mean_b
    squares = jnp.square(mean_a) + jnp.square(mean_b)
    covariance = _smooth(a_BHWC * b_BHWC) - product
    variances = _smooth(jnp.square(a_BHWC) + jnp.square(b_BHWC)) - squares
    structure = (2 * covariance + _C2) / (variances + _C2)
    light = (2 * product + _C1) / (squares + _C1)
    return jnp.mean(light * structure, axis=(1, 2)), jnp.mean(structure, axis=(1, 2))


def ssim(a_BHWC: Float[Array, "B H W C"], b_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """Structural similarity (Wang et al. 2004) of images in [0, 255]: Gaussian window of 11, mean over channels."""
    return jnp.mean(_terms(a_BHWC, b_BHWC)[0], axis=-1)


def ms_ssim(a_BHWC: Float[Array, "B H W C"], b_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """SSIM over five scales (Wang, Simoncelli and Bovik 2003) of images in [0, 255], 176 pixels a side or more."""
    total = jnp.ones((len(a_BHWC), a_BHWC.shape[-1]))
    for scale, weight in enumerate(_WEIGHTS):
        if scale:
            a_BHWC, b_BHWC = _halve(a_BHWC), _halve(b_BHWC)
        whole, structure = _terms(a_BHWC, b_BHWC)
        last = scale == len(_WEIGHTS) - 1
        total *= jnp.maximum(whole if last else structure, 0.0) ** weight
    return jnp.mean(total, axis=-1)


def _halve(x_BHWC: Array) -> Array:
    """Means of 2 x 2 pixels; an odd side is reflected by one."""
    x = jnp.pad(x_BHWC, ((0, 0), (0, x_BHWC.shape[1] % 2), (0, x_BHWC.shape[2] % 2), (0, 0)), mode="symmetric")
    B, H, W, C = x.shape
    return jnp.mean(x.reshape(B, H // 2, 2, W // 2, 2, C), axis=(2, 4))
