"""One pass over a set of images that gathers what its scores need, and no more than that.

Shapes: N images, D features, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from imagegpt_jax.metrics import artefacts, statistics
from imagegpt_jax.metrics.collected import CLASSES, MOMENTS, ROWS, VALUES, Collected, Output
from imagegpt_jax.metrics.features import Network, Part, extract
from imagegpt_jax.metrics.protocols import Protocol
from imagegpt_jax.metrics.sets import ImageSet

_CHECKED = 64  # images that are looked at for traces of JPEG


def collect(
    images: ImageSet,
    needs: Mapping[str, Sequence[Output]],
    networks: Sequence[Network],
    protocol: Protocol,
    *,
    batch_size: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> Collected:
    """Passes over the set once.

    Args:
      images: the set.
      needs: `MOMENTS`, `CLASSES`, `ROWS` -> the outputs that are needed in that form.
      networks: what computes them.
      protocol: how the Inception Score cuts.
      batch_size: images that a process reads at once.
      advance: told how many images have been done since the last call.

    Raises:
      UserError: if an image is damaged.
    """
    found = Collected(np.zeros((len(images), 32), np.uint8), {}, {}, {})
    outputs = sorted({output for wanted in needs.values() for output in wanted})
    cut = protocol.inception
    if cut.count:
        splits_N = statistics.splits_by_number(len(images), cut.count, cut.shuffle_seed)
    else:
        splits_N = np.arange(len(images)) // cut.size
    for part in extract(images, networks, outputs, batch_size=batch_size, advance=advance):
        _add(found, part, needs, splits_N)
    _check_artefacts(found, images)
    return found


def _add(found: Collected, part: Part, needs: Mapping[str, Sequence[Output]], splits_N: np.ndarray) -> None:
    numbers = slice(part.start, part.start + len(part.digests))
    found.digests[numbers] = part.digests
    for output in needs.get(MOMENTS, ()):
        rows = part.features[output]
        found.moments.setdefault(output, statistics.Moments(rows.shape[1])).add(rows)
    for output in needs.get(CLASSES, ()):
        rows = part.features[output]
        scores = found.classes.setdefault(
            output, statistics.ClassScores(int(splits_N.max()) + 1 if len(splits_N) else 1, rows.shape[1])
        )
        scores.add(rows, splits_N[numbers])
    for output in needs.get(VALUES, ()):
        values = found.values.setdefault(output[1], np.zeros(len(found.digests)))
        values[numbers] = part.features[output]
    for output in needs.get(ROWS, ()):
        rows = part.features[output].reshape(len(part.digests), -1)
        found.rows.setdefault(output, statistics.Rows(rows.shape[1])).add(rows)


def _check_artefacts(found: Collected, images: ImageSet) -> None:
    if len(images.shape) != 3 or "decoded" in images.formats:
        return
    last = min(_CHECKED, len(images)) - 1 if images.in_order else len(images) - 1
    chosen = np.unique(np.linspace(0, last, min(_CHECKED, len(images))).astype(int))
    found.checked = len(chosen)
    found.jpeg_like = sum(artefacts.looks_like_jpeg(images.read(int(number))) for number in chosen)
