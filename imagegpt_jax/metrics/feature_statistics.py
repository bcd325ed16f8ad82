"""One pass over a set of images that gathers what its scores need, and no more than that.

Importing this does not import JAX. Shapes: N images, D features, K classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from imagegpt_jax.metrics import artefacts, frechet, statistics

if TYPE_CHECKING:
    from imagegpt_jax.metrics.features import Network
    from imagegpt_jax.metrics.protocols import Protocol
    from imagegpt_jax.metrics.sets import ImageSet

Output = tuple[str, str]  # network, and which of its outputs
MOMENTS, CLASSES, ROWS, VALUES, JUDGED = "moments", "classes", "rows", "values", "judged"
_CHECKED = 64  # images that are looked at for traces of JPEG


@dataclasses.dataclass
class FeatureStatistics:
    """What one pass has gathered of a set."""

    digests: np.ndarray  # uint8 [N, 32], SHA-256 of each image's pixels
    moments: dict[Output, statistics.Moments] = dataclasses.field(default_factory=dict)
    classes: dict[Output, statistics.ClassScores] = dataclasses.field(default_factory=dict)
    rows: dict[Output, statistics.Rows] = dataclasses.field(default_factory=dict)  # every feature
    values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # what pair metrics say of each image
    jpeg_like: int = 0  # how many of the `checked` images show traces of JPEG
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

    def gaussian(self, output: Output) -> frechet.Gaussian:
        """Mean and covariance of an output, as of `FileStatistics`."""
        return frechet.Gaussian.of(self.moments[output])

    def features(self, output: Output) -> statistics.Rows:
        """Every feature of an output."""
        return self.rows[output]

    def keys(self) -> Iterable[bytes]:
        """A key for each image, equal for equal images."""
        return (digest.tobytes() for digest in self.digests)

    def add(self, form: str, output: Output, features_NX: np.ndarray, start: int = 0, splits_N: Any = ()) -> None:
        """Adds an output's features of images in a form: `MOMENTS`, `CLASSES`, `ROWS` or `VALUES`.

        `CLASSES` and `VALUES` ask for `start`, the number of the first image, and `CLASSES` for `splits_N`, the split
        of each image of the set.
        """
        stop = start + len(features_NX)
        if form == MOMENTS:
            self.moments.setdefault(output, statistics.Moments(features_NX.shape[1])).add(features_NX)
        elif form == CLASSES:
            if output not in self.classes:
                self.classes[output] = statistics.ClassScores(max(splits_N, default=0) + 1, features_NX.shape[1])
            self.classes[output].add(features_NX, splits_N[start:stop])
        elif form == VALUES:
            self.values.setdefault(output[1], np.zeros(self.count))[start:stop] = features_NX
        else:
            rows_ND = features_NX.reshape(len(features_NX), -1)
            self.rows.setdefault(output, statistics.Rows(rows_ND.shape[1])).add(rows_ND)

    def close(self) -> None:
        """Frees the temporary files."""
        for rows in self.rows.values():
            rows.close()


def collect(
    images: ImageSet,
    needs: Mapping[str, Sequence[Output]],
    networks: Sequence[Network],
    protocol: Protocol,
    *,
    batch_size: int,
    advance: Callable[[int], Any],
) -> FeatureStatistics:
    """Passes over the set once.

    `needs` are the outputs that are wanted in each form, `protocol` says how the Inception Score splits; the rest is as
    of `features.extract`, which raises a UserError for a damaged image.
    """
    from imagegpt_jax.metrics.features import extract

    gathered = FeatureStatistics(np.zeros((len(images), 32), np.uint8))
    outputs = sorted(set(itertools.chain(*needs.values())))
    splits_N = protocol.inception.split(len(images))
    for part in extract(images, networks, outputs, batch_size=batch_size, advance=advance):
        gathered.digests[part.start : part.start + len(part.digests)] = part.digests
        for form, wanted in needs.items():
            for output in wanted:
                gathered.add(form, output, part.features[output], part.start, splits_N)
    if len(images.shape) == 3 and "decoded" not in images.formats:
        last = min(_CHECKED, len(images)) - 1 if images.in_order else len(images) - 1
        chosen = np.unique(np.linspace(0, last, min(_CHECKED, len(images))).astype(int))
        gathered.checked = len(chosen)
        gathered.jpeg_like = sum(artefacts.looks_like_jpeg(images.read(int(number))) for number in chosen)
    return gathered
