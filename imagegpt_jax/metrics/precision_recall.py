"""Fidelity and diversity apart: precision and recall, density and coverage, by balls around nearest neighbours.

Shapes: N images, M references, D features.
"""

import numpy as np
from jaxtyping import Float

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics.statistics import Rows


def _squared(a_nD: np.ndarray, b_mD: np.ndarray) -> np.ndarray:
    """Squared distances [n, m]; rows are moved by one mean first, so that little cancels."""
    a_nD, b_mD = a_nD.astype(np.float64), b_mD.astype(np.float64)
    middle_D = b_mD.mean(axis=0)
    a_nD, b_mD = a_nD - middle_D, b_mD - middle_D
    square = np.square(a_nD).sum(axis=1)[:, None] + np.square(b_mD).sum(axis=1) - 2 * a_nD @ b_mD.T
    return np.maximum(square, 0.0)


def radii(table: Rows, neighbours: int) -> Float[np.ndarray, "N"]:
    """Squared distance of each row to its `neighbours`-th nearest other; raises UserError if there are not so many."""
    if len(table) <= neighbours:
        raise UserError(f"the {neighbours}-th nearest neighbour needs more than {neighbours} images, not {len(table)}.")
    radii_N = np.empty(len(table))
    for start, rows in table.chunks():
        nearest = np.full((len(rows), 0), np.inf)
        for other, columns in table.chunks():
            square = _squared(rows, columns)
            same = np.arange(start, start + len(rows))[:, None] == np.arange(other, other + len(columns))
            square[same] = np.inf  # a row is not its own neighbour, though another with its numbers is
            both = np.concatenate([nearest, square], axis=1)
            nearest = np.partition(both, neighbours - 1, axis=1)[:, :neighbours] if both.shape[1] > neighbours else both
        radii_N[start : start + len(rows)] = nearest.max(axis=1)
    return radii_N


def share_inside(points: Rows, centres: Rows, radii_M: Float[np.ndarray, "M"]) -> float:
    """Share of points that lie in a ball around at least one centre, its surface included."""
    inside = 0
    for _, rows in points.chunks():
        hit = np.zeros(len(rows), bool)
        for start, columns in centres.chunks():
            hit |= (_squared(rows, columns) <= radii_M[start : start + len(columns)]).any(axis=1)
        inside += int(hit.sum())
    return inside / len(points)


def precision_recall(images: Rows, references: Rows, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of Kynkaanniemi et al. 2019 (arXiv:1904.06991).

    Returns:
      (share of images near some reference, share of references near some image); near is within the distance of the
      `neighbours`-th nearest neighbour in the set of that point.
    """
    return (
        share_inside(images, references, radii(references, neighbours)),
        share_inside(references, images, radii(images, neighbours)),
    )


def density_coverage(images: Rows, references: Rows, neighbours: int = 5) -> tuple[float, float]:
    """Density and coverage of Naeem et al. 2020 (arXiv:2002.09797).

    Returns:
      (mean number of references' balls that an image lies in, divided by `neighbours`; share of references whose ball
      holds an image).
    """
    radii_M = radii(references, neighbours)
    balls, covered_M = 0, np.zeros(len(references), bool)
    for _, rows in images.chunks():
        for start, columns in references.chunks():
            inside = _squared(rows, columns) < radii_M[start : start + len(columns)]
            balls += int(inside.sum())
            covered_M[start : start + len(columns)] |= inside.any(axis=0)
    return balls / (neighbours * len(images)), float(covered_M.mean())
