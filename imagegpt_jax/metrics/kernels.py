"""Distances by kernels: KID, and CMMD on CLIP's embeddings.

Shapes: N M examples, D features, n examples of a subset.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics.statistics import Rows, unit

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


@dataclasses.dataclass(frozen=True)
class Subsets:
    """How KID draws its `count` subsets: numbers from `RandomState(seed)`, as the reference programs do."""

    count: int = 100
    size: int = 1000  # all of a smaller set
    seed: int = 2020
    reference_first: bool = False  # whether the reference's subset is drawn before that of the images

    def draw(self, images: int, references: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of images and of references, for each subset."""
        rng = np.random.RandomState(self.seed)
        size = self.size_of(images, references)
        for _ in range(self.count):
            first, second = (references, images) if self.reference_first else (images, references)
            chosen = rng.choice(first, size, replace=False), rng.choice(second, size, replace=False)
            yield (chosen[1], chosen[0]) if self.reference_first else chosen

    def size_of(self, images: int, references: int) -> int:
        """The size of the subsets of sets of these sizes."""
        return min(self.size, images, references)


def mmd2_unbiased(a_nD: Float[np.ndarray, "n D"], b_nD: Float[np.ndarray, "n D"], *, paired: bool = False) -> float:
    """Unbiased squared maximum mean discrepancy of equally many rows under the kernel (x.y / D + 1)^3.

    Args:
      a_nD: one set.
      b_nD: the other.
      paired: whether row i of one belongs to row i of the other, as a reconstruction does to its original. Such pairs
        are no independent draws and are left out (Gretton et al. 2012, JMLR 13, eq. 4), else they pull the estimate
        below zero.
    """
    a_nD, b_nD = np.asarray(a_nD, np.float64), np.asarray(b_nD, np.float64)
    n, size = a_nD.shape

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / size + 1) ** 3

    def unlike(k: np.ndarray) -> float:
        return float(k.sum() - np.trace(k)) / (n * (n - 1))

    across = kernel(a_nD, b_nD)
    return sum(unlike(kernel(x, x)) for x in (a_nD, b_nD)) - 2 * (unlike(across) if paired else float(across.mean()))


def kid(images: Rows, references: Rows, subsets: Subsets) -> Float[np.ndarray, "subsets"]:
    """Kernel Inception Distance of each subset (Binkowski et al. 2018, arXiv:1801.01401); their mean is the score.

    Raises:
      UserError: if a set has fewer than two images.
    """
    if min(len(images), len(references)) < 2:
        raise UserError(f"KID needs at least 2 images on each side, not {len(images)} and {len(references)}.")
    draws = subsets.draw(len(images), len(references))
    return np.array([mmd2_unbiased(images.take(a), references.take(b)) for a, b in draws])


def cmmd(images: Rows, references: Rows) -> float:
    """CMMD of CLIP embeddings (Jayasumana et al. 2024, arXiv:2401.09603): a Gaussian kernel of width 10, times 1000.

    Embeddings are scaled to unit length; all pairs count, a row with itself included, as in the authors' program.
    """

    def mean_kernel(a: Rows, b: Rows) -> float:
        total = 0.0
        for _, x in a.chunks():
            x = unit(x)
            for _, y in b.chunks():
                total += float(np.exp((x @ unit(y).T - 1) / CMMD_SIGMA**2).sum())
        return total / (len(a) * len(b))

    return CMMD_SCALE * (
        mean_kernel(images, images) + mean_kernel(references, references) - 2 * mean_kernel(images, references)
    )
