"""Traces that JPEG leaves in images which were saved as something else afterwards.

JPEG rounds the cosine coefficients of 8 x 8 blocks, many of them to zero. On the grid of those blocks more coefficients
are zero than on a grid moved by half a block; in a picture that never was a JPEG the two grids look alike.
"""

import numpy as np
from jaxtyping import UInt8

_BLOCK = 8
_SMALL = 0.7  # coefficients below this are zeros, but for the rounding of pixels to 8 bits
_MORE = 0.1  # share of coefficients by which the grids must differ

_n = np.arange(_BLOCK)
_COSINES = np.sqrt(2 / _BLOCK) * np.cos((2 * _n + 1) * _n[:, None] * np.pi / (2 * _BLOCK))
_COSINES[0] /= np.sqrt(2)


def _zeros(luma: np.ndarray, offset: int) -> float:
    rows, columns = ((side - offset) // _BLOCK for side in luma.shape)
    part = luma[offset : offset + rows * _BLOCK, offset : offset + columns * _BLOCK]
    blocks = part.reshape(rows, _BLOCK, columns, _BLOCK)
    coefficients = np.einsum("ui,ricj,vj->rcuv", _COSINES, blocks, _COSINES, optimize=True)
    high = coefficients[..., np.add.outer(_n, _n) >= 4]
    lively = np.abs(coefficients.reshape(rows, columns, -1)[..., 1:]).max(axis=-1) > 2  # flat blocks say nothing
    return float((np.abs(high[lively]) < _SMALL).mean()) if lively.any() else 0.0


def looks_like_jpeg(image_HWC: UInt8[np.ndarray, "H W 3"]) -> bool:
    """Whether the image seems to have been a JPEG, blocks aligned to its upper left corner."""
    if min(image_HWC.shape[:2]) < 3 * _BLOCK:
        return False
    luma = image_HWC.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return _zeros(luma, 0) - _zeros(luma, _BLOCK // 2) > _MORE
