"""Frechet distance between Gaussians, of which FID, sFID and FD-DINOv2 are cases, and its limit for many samples.

Shapes: D features, R rank of a covariance.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.linalg
from jaxtyping import Float

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics.statistics import BLOCK, Moments, Rows


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean, covariance, and how many samples they are of (None: not known)."""

    mean_D: Float[np.ndarray, "D"]
    covariance_DD: Float[np.ndarray, "D D"]
    count: int | None = None

    @classmethod
    def of(cls, moments: Moments) -> "Gaussian":
        """That of the rows so far."""
        return cls(moments.mean, moments.covariance, moments.count)

    def factor(self) -> Float[np.ndarray, "D R"]:
        """L with L L^T = covariance, by Cholesky's method with pivots.

        N samples span at most N - 1 dimensions: the method ends where nothing but rounding is left, which would count
        in the distance by the square root of its size.
        """
        (pstrf,) = scipy.linalg.get_lapack_funcs(("pstrf",), (self.covariance_DD,))
        lower, pivots, rank, info = pstrf(self.covariance_DD, lower=1)
        if info < 0:
            raise AssertionError(f"pstrf: argument {-info}")
        factor = np.zeros((len(self.mean_D), rank))
        factor[pivots - 1] = np.tril(lower)[:, :rank]
        return factor


def distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (arXiv:1706.08500).

    With C = L L^T the last trace is the sum of the singular values of L_a^T L_b: no square root of a product that
    rounding has made indefinite, and exact zeros where the samples are fewer than the features.

    Raises:
      UserError: if the two are not of the same size, or hold numbers that are not finite.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise UserError(
            f"statistics of {len(a.mean_D)} and {len(b.mean_D)} features cannot be compared: they are of two networks."
        )
    for part in (a, b):
        if not (np.isfinite(part.mean_D).all() and np.isfinite(part.covariance_DD).all()):
            raise UserError("the statistics hold numbers that are not finite: the features or the file are damaged.")
    product = a.factor().T @ b.factor()
    root = float(np.linalg.svd(product, compute_uv=False).sum()) if product.size else 0.0
    step_D = a.mean_D - b.mean_D
    return float(step_D @ step_D + np.trace(a.covariance_DD) + np.trace(b.covariance_DD) - 2 * root)


def of_rows(rows: Rows, numbers: np.ndarray) -> Gaussian:
    """The Gaussian of some rows, which may come up more than once."""
    moments = Moments(rows.size)
    for start in range(0, len(numbers), BLOCK):
        moments.add(rows.take(numbers[start : start + BLOCK]))
    return Gaussian.of(moments)


def infinity(
    rows: Rows, reference: Gaussian, *, sizes: int = 15, smallest: int = 5000, seed: int = 0
) -> tuple[float, Sequence[tuple[int, float]]]:
    """FID-infinity: what the distance would be for infinitely many samples (Chong and Forsyth 2020, arXiv:1911.07023).

    Distances of random subsets of `sizes` growing sizes, a line over 1 / size, and its value at 0. The `smallest` size
    is half of the samples if there are fewer than twice as many.

    Returns:
      (the limit, [(size, distance)]).

    Raises:
      UserError: if there are fewer than 20 samples.
    """
    count = len(rows)
    if count < 20:
        raise UserError(f"FID-infinity draws a line through many sample sizes and needs 20 images, not {count}.")
    chosen = np.linspace(min(smallest, count // 2), count, sizes).astype(int)
    rng = np.random.default_rng(seed)
    points = [
        (int(n), distance(of_rows(rows, rng.choice(count, n, replace=False)), reference)) for n in np.unique(chosen)
    ]
    counts, values = np.array(points).T
    _, limit = np.polyfit(1 / counts, values, 1)
    if not math.isfinite(limit):
        raise UserError("FID-infinity is not finite: the features hold numbers that are not.")
    return float(limit), points
