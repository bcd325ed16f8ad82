"""What one pass over a set of images has gathered. Nothing here starts JAX.

Shapes: N images.
"""

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from imagegpt_jax.metrics import statistics

Output = tuple[str, str]  # network, and which of its outputs
MOMENTS, CLASSES, ROWS, VALUES, JUDGED = "moments", "classes", "rows", "values", "judged"


@dataclasses.dataclass
class Collected:
    """What is known of a set.

    Attributes:
      digests: uint8 [N, 32], SHA-256 of each image's pixels.
      moments: mean and covariance of an output.
      classes: class scores of an output.
      rows: every feature of an output, in a temporary file.
      values: what pair metrics say of each image.
      jpeg_like: how many of `checked` images show traces of JPEG.
      checked: how many were looked at.
    """

    digests: np.ndarray
    moments: dict[Output, statistics.Moments]
    classes: dict[Output, statistics.ClassScores]
    rows: dict[Output, statistics.Rows]
    values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    jpeg_like: int = 0
    checked: int = 0

    @property
    def count(self) -> int:
        """N."""
        return len(self.digests)

    @property
    def sha256(self) -> str:
        """Of all pixels in their order."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()

    @property
    def duplicates(self) -> int:
        """Images that are there already."""
        return self.count - len(set(self.keys()))

    def keys(self) -> Iterable[bytes]:
        """A key for each image, equal for equal images."""
        return (digest.tobytes() for digest in self.digests)

    def close(self) -> None:
        """Frees the temporary files."""
        for rows in self.rows.values():
            rows.close()
