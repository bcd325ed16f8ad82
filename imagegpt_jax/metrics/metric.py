"""What a metric of a set of images is: what it needs, the function that computes it, and the form of a score.

`score.METRICS` is the table of ours; a user's own is a `Metric` in a module on the Python path, asked for as
`--metrics=module:NAME`. Importing this does not import JAX. Shapes: N images, E embedding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics.feature_statistics import CLASSES, JUDGED, MOMENTS, ROWS, VALUES, FeatureStatistics, Output

if TYPE_CHECKING:
    from imagegpt_jax.metrics.protocols import Protocol
    from imagegpt_jax.metrics.statistics import Rows
    from imagegpt_jax.metrics.statistics_files import FileStatistics

Result = dict[str, Any]
_Z = 1.959963984540054  # of a 95% interval of a normal distribution
# What a metric compares images with.
IMAGES, STATISTICS, PAIRS, CAPTIONS, PROMPTS, NOTHING = "images", "statistics", "pairs", "captions", "prompts", ""


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be asked for besides."""

    bootstrap: int = 0  # resamplings of the images for the intervals of Frechet distances; 0 leaves them out
    infinity: bool = False  # whether Frechet distances are extrapolated to infinitely many images
    seed: int = 0  # of both


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a metric needs, and how it is computed of that.

    Attributes:
      compute: `Inputs` -> `result(...)`.
      output: output of the network that it is of, such as "pool".
      form: what is gathered of that output: `MOMENTS`, `CLASSES`, `ROWS`, `VALUES` (one for each pair of images), or
        `JUDGED` (by a user's scorer).
      network: name of the network; "" for the protocol's.
      reference: `IMAGES`, `STATISTICS` (images will do too), `PAIRS` (image by image), `CAPTIONS`, `PROMPTS` or
        `NOTHING`.
      compare: of `PAIRS`, but for LPIPS, whose network compares: function of two batches of images, float32
        [B, H, W, 3] in [0, 255] -> [B]; or "module:function".
      min_side: pixels that a side of an image must have.
      lower_is_better: whether a smaller value is the better one.

    Raises:
      UserError: for a combination that nothing computes.
    """

    compute: Callable[[Inputs], Result]
    output: str = ""
    form: str = ROWS
    network: str = ""
    reference: str = IMAGES
    compare: Callable[..., Any] | str = ""
    min_side: int = 1
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        possible = {
            MOMENTS: (STATISTICS, NOTHING),
            CLASSES: (NOTHING,),
            ROWS: (IMAGES, CAPTIONS, NOTHING),
            VALUES: (PAIRS,),
            JUDGED: (PROMPTS,),
        }
        if self.form not in possible or self.reference not in possible[self.form]:
            legal = "; ".join(f"{form} of {' or '.join(map(repr, refs))}" for form, refs in possible.items())
            raise UserError(f"no metric has form={self.form!r} and reference={self.reference!r}: there are {legal}.")
        if not callable(self.compute):
            raise UserError(f"a metric is computed by a function of Inputs, not by {self.compute!r}.")
        if self.form in (MOMENTS, CLASSES, ROWS) and not self.output:
            raise UserError("a metric of features says which output of a network they are: give output='pool'.")
        if bool(self.compare) + (self.network == "lpips") != (self.form == VALUES):
            raise UserError("a metric of pairs of images, and no other, has compare=FUNCTION, or network='lpips'.")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a metric is computed from."""

    name: str
    output: Output
    images: FeatureStatistics
    reference: FeatureStatistics | FileStatistics | None  # None where the metric needs none
    protocol: Protocol
    options: Options
    captions: Sequence[str]  # of the images; empty where no metric needs them
    texts_NE: np.ndarray | None  # CLIP's embeddings of them
    judged: tuple[float, dict[str, float]] | None  # GenEval's score and its shares by kinds of prompts
    shared: dict[tuple[str, ...], Any]  # results that several metrics are taken from, by what they are called

    @property
    def rows(self) -> Rows:
        """Every feature of the images."""
        return self.images.features(self.output)

    @property
    def reference_rows(self) -> Rows:
        """Every feature of the reference."""
        assert self.reference is not None
        return self.reference.features(self.output)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A result that several metrics are taken from, computed for the first of them."""
        key = (*self.output, name)
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]


# ------------------------------------------------------------------------------------------------------------ results


def result(value: float, n: int, interval: tuple[float, float] | None = None, of: str = "", **more: Any) -> Result:
    """A score as it is written: of `n` images, with an interval `of` some kind, and what else is to be said."""
    ends = None if interval is None else [float(end) for end in interval]
    return {"value": float(value), "n": n, "interval": ends, "interval_of": of if ends else "", **more}


def of_share(value: float, n: int, **more: Any) -> Result:
    """A share of n, with Wilson's interval."""
    centre = (value + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(value * (1 - value) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    ends = (max(0.0, centre - half), min(1.0, centre + half))
    return result(value, n, ends, "Wilson, 95%", **more)


def of_values(values_N: np.ndarray, **more: Any) -> Result:
    """A mean of one value for each image, with its normal interval."""
    values_N = np.asarray(values_N, np.float64)
    half = _Z * values_N.std(ddof=1) / math.sqrt(len(values_N)) if len(values_N) > 1 else 0.0
    mean = float(values_N.mean())
    ends = (mean - half, mean + half) if len(values_N) > 1 else None
    return result(mean, len(values_N), ends, "normal, 95%", **more)


def of_parts(values: np.ndarray, n: int, of: str, **more: Any) -> Result:
    """A mean of the values of splits or subsets of n images, with the interval that holds 95% of them."""
    ends = (float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))) if len(values) > 1 else None
    return result(values.mean(), n, ends, f"{of}, 95%", std=float(values.std()), **more)


def of_pairs(x: Inputs) -> Result:
    """The mean of what `compare` says of each pair."""
    return of_values(x.images.values[x.name])
