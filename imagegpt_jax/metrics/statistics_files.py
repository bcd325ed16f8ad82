"""Files of statistics in place of reference images: `.npz` with the keys of ADM's files, and our own.

Importing this does not import JAX. Shapes: N images, D features.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics.frechet import Gaussian
from imagegpt_jax.metrics.statistics import Moments, Rows
from imagegpt_jax.models.pretrained import weights
from imagegpt_jax.runtime import filesystem

if TYPE_CHECKING:
    from imagegpt_jax.metrics.feature_statistics import FeatureStatistics
    from imagegpt_jax.metrics.sets import ImageSet

FEATURES = ("pool_3", "features", "activations", "acts")
# Output of the network -> keys of its mean and covariance.
KEYS: Mapping[str, tuple[str, str]] = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclasses.dataclass(frozen=True)
class FileStatistics:
    """Means and covariances, or features, of a network, in place of reference images."""

    path: str
    arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]  # "pool", perhaps "spatial" -> float64 [D] and [D, D]
    rows: Rows | None  # features [N, D] of "pool"
    count: int | None  # images that they are of; None if the file does not say
    about: Mapping[str, Any]  # what our own files say of themselves: protocol, hashes, version
    sha256: str  # of the file
    network: str
    images: "ImageSet | None" = None  # reference images that lie beside the statistics, as in ADM's files
    beside: "FeatureStatistics | None" = None  # statistics of those images, once they were passed over

    def gaussian(self, output: tuple[str, str]) -> Gaussian:
        """Mean and covariance of an output; raises UserError if the file does not hold them."""
        if output[0] != self.network or output[1] not in self.arrays:
            raise UserError(
                f"{self.path} holds statistics of {', '.join(self.arrays)} of {self.network}, not {output[1]!r} of"
                f" {output[0]}: give reference images."
            )
        return Gaussian(*self.arrays[output[1]], self.count)

    def features(self, output: tuple[str, str]) -> Rows:
        """Every feature of an output, or of images beside the statistics; raises UserError if there are none."""
        if self.beside is not None:
            return self.beside.features(output)
        if self.rows is None or output != (self.network, "pool"):
            raise UserError(
                f"{self.path} holds means and covariances, which FID can be computed from; KID, precision, recall and"
                " the like need reference images, or features."
            )
        return self.rows


def read_statistics(
    path: epath.Path, keys: Sequence[str], features: str | None, network: str, images: "ImageSet | None"
) -> FileStatistics:
    """Reads a `.npz` with these keys, one of which may hold `features`, of a network; `images` may lie in it too.

    Raises:
      UserError: for arrays that are not of the right shapes.
    """
    with np.load(str(path), allow_pickle=False) as file:
        arrays = {}
        for name, (mean, covariance) in KEYS.items():
            if mean in keys and covariance in keys:
                pair = (np.asarray(file[mean], np.float64), np.asarray(file[covariance], np.float64))
                if pair[0].ndim != 1 or pair[1].shape != (len(pair[0]),) * 2:
                    raise UserError(f"{path}: {mean} is {pair[0].shape} and {covariance} {pair[1].shape}: damaged.")
                arrays[name] = pair
        rows_ND = np.asarray(file[features], np.float32) if features else None
        about = json.loads(str(file["about"])) if "about" in keys else {}
        count = int(file["n"]) if "n" in keys else None if rows_ND is None else len(rows_ND)
    rows = None
    if rows_ND is not None:
        rows = Rows(rows_ND.shape[1])
        rows.add(rows_ND)
        mean_D = rows_ND.mean(axis=0, dtype=np.float64)
        centred_ND = rows_ND.astype(np.float64) - mean_D
        arrays.setdefault("pool", (mean_D, centred_ND.T @ centred_ND / max(len(rows) - 1, 1)))
    return FileStatistics(str(path), arrays, rows, count, about, weights.sha256(path), network, images)


def write_statistics(
    path: epath.PathLike, count: int, moments: Mapping[str, Moments], about: Mapping[str, Any]
) -> None:
    """Writes means and covariances of so many images, by the output that they are of, with what they are of."""
    arrays: dict[str, Any] = {"n": np.int64(count)}
    for output, gathered in moments.items():
        mean, covariance = KEYS[output]
        arrays |= {mean: gathered.mean, covariance: gathered.covariance}
    out = io.BytesIO()
    np.savez(out, about=np.array(json.dumps(about)), **arrays)
    filesystem.write_whole(path, out.getvalue())
