"""Scores of a set of images against a reference, each with its interval, its number of images, and what it was made of.

Shapes: N images, D features.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.metrics import captions, frechet, kernels, pairs, precision_recall
from imagegpt_jax.metrics.collected import CLASSES, JUDGED, MOMENTS, ROWS, VALUES, Collected, Output
from imagegpt_jax.metrics.protocols import Protocol
from imagegpt_jax.metrics.sets import Statistics

Result = dict[str, Any]
_Z = 1.959963984540054  # of a 95% interval of a normal distribution


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be asked for besides.

    Attributes:
      bootstrap: resamplings of the images for the intervals of Frechet distances; 0 leaves them out.
      infinity: whether Frechet distances are extrapolated to infinitely many images.
      seed: of both.
    """

    bootstrap: int = 0
    infinity: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a metric needs.

    Attributes:
      output: output of the network; the network is the protocol's if `network` is "".
      form: in which form.
      network: name of the network.
      reference: "images", "statistics" (images will do too), "pairs" (image by image), "captions", "prompts" or
        "" (none).
    """

    output: str
    form: str
    network: str = ""
    reference: str = "images"


METRICS: Mapping[str, Metric] = {
    "fid": Metric("pool", MOMENTS, reference="statistics"),
    "sfid": Metric("spatial", MOMENTS, reference="statistics"),
    "is": Metric("logits", CLASSES, reference=""),
    "kid": Metric("pool", ROWS),
    "precision": Metric("pool", ROWS),
    "recall": Metric("pool", ROWS),
    "density": Metric("pool", ROWS),
    "coverage": Metric("pool", ROWS),
    "fd_dinov2": Metric("pool", MOMENTS, network="dinov2", reference="statistics"),
    "cmmd": Metric("embedding", ROWS, network="clip"),
    "clip_score": Metric("embedding", ROWS, network="clip", reference="captions"),
    "r_precision": Metric("embedding", ROWS, network="clip", reference="captions"),
    "geneval": Metric("", JUDGED, network="scorer", reference="prompts"),
    **{name: Metric(name, VALUES, network="pairs", reference="pairs") for name in pairs.METRICS},
}
_DENSITY_NEIGHBOURS = 5
NETWORKS = ("inception", "clip", "dinov2", "efficientnet_lite0", "lpips")
# Networks whose weights are not downloaded, and the files that they are in.
_FILES: Mapping[str, str] = {
    "clip": "model.safetensors of openai/clip-vit-base-patch32 or -large-patch14, or the folder that holds it",
    "dinov2": "model.safetensors of facebook/dinov2-large, or the folder that holds it",
    "lpips": "made by `python tools/convert_lpips.py`, or a folder of torchvision's and lpips' files",
}


def check_metrics(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError for a metric that there is not, or that comes twice."""
    for name in names:
        if name not in known:
            raise UserError(f"unknown metric {name!r}.{suggest(name, known)} All: {', '.join(known)}.")
    if len(set(names)) < len(names) or not names:
        raise UserError("--metrics names each metric once, such as --metrics=fid,is,kid.")


def require_weights(name: str, path: str) -> None:
    """Raises UserError if a network needs a file of weights and `path` is empty."""
    if name in _FILES and not path:
        raise UserError(f"no weights of {name}: give --feature_weights={name}=PATH, {_FILES[name]}.")


def output_of(name: str, protocol: Protocol) -> Output:
    """Network and output that a metric is computed from."""
    metric = METRICS[name]
    return metric.network or protocol.features, metric.output


def needs(names: Sequence[str], protocol: Protocol, options: Options, *, reference: bool) -> dict[str, list[Output]]:
    """Form -> the outputs that the metrics need of the images, or of the reference, in that form."""
    found: dict[str, list[Output]] = {}
    for name in names:
        metric = METRICS[name]
        if metric.form in (VALUES, JUDGED) or (reference and metric.reference not in ("images", "statistics")):
            continue  # pairs are a pass of their own
        forms = [metric.form]
        if metric.form == MOMENTS and not reference and (options.bootstrap or options.infinity):
            forms.append(ROWS)
        for form in forms:
            if (output := output_of(name, protocol)) not in found.setdefault(form, []):
                found[form].append(output)
    return found


class Reference:
    """What images are compared with: a set that was passed over, or a file of statistics."""

    def __init__(self, source: Collected | Statistics, features: str, beside: Collected | None = None):
        """Makes a reference.

        Args:
          source: what it is.
          features: the network that a file's statistics are of.
          beside: the images that lie beside statistics, once they were passed over.
        """
        self._source, self._features, self._beside = source, features, beside

    def gaussian(self, output: Output) -> frechet.Gaussian:
        """Mean and covariance of an output.

        Raises:
          UserError: if a file does not hold them.
        """
        if isinstance(self._source, Collected):
            return frechet.Gaussian.of(self._source.moments[output])
        if output[0] != self._features or output[1] not in self._source.arrays:
            raise UserError(
                f"{self._source.path} holds statistics of {', '.join(self._source.arrays)} of {self._features}, not"
                f" {output[1]!r} of {output[0]}: give reference images."
            )
        return frechet.Gaussian(*self._source.arrays[output[1]], self._source.count)

    def rows(self, output: Output) -> kernels.Table:
        """Every feature of an output.

        Raises:
          UserError: if a file does not hold them.
        """
        if isinstance(self._source, Collected):
            return self._source.rows[output]
        if self._beside is not None:
            return self._beside.rows[output]
        if self._source.features is None or output != (self._features, "pool"):
            raise UserError(
                f"{self._source.path} holds means and covariances, which FID can be computed from; KID, precision,"
                " recall and the like need reference images, or features."
            )
        return _Held(self._source.features)

    def check(self, names: Sequence[str], protocol: Protocol) -> None:
        """Raises UserError if a metric needs what a file of statistics does not hold."""
        for name in names if isinstance(self._source, Statistics) else ():
            if METRICS[name].reference == "statistics":
                self.gaussian(output_of(name, protocol))
            elif METRICS[name].reference == "pairs":
                raise UserError(f"{name} compares images one by one: give reference images, not statistics.")
            elif METRICS[name].reference == "images" and getattr(self._source, "images", None) is None:
                self.rows(output_of(name, protocol))


class _Held:
    """Rows that are in memory."""

    def __init__(self, rows_ND: np.ndarray):
        self._rows_ND = rows_ND

    def __len__(self) -> int:
        return len(self._rows_ND)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The rows with these numbers."""
        return self._rows_ND[numbers]

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows from `start` up to `stop`."""
        return self._rows_ND[start:stop]


# ------------------------------------------------------------------------------------------------------------ results


def result(value: float, n: int, interval: tuple[float, float] | None, of: str, **more: Any) -> Result:
    """A score as it is written."""
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


def _spread(values: np.ndarray) -> tuple[float, float] | None:
    return (float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))) if len(values) > 1 else None


def compute(
    names: Sequence[str],
    images: Collected,
    reference: Reference | None,
    protocol: Protocol,
    options: Options,
    words: "Words | None" = None,
    judged: tuple[float, dict[str, float]] | None = None,
) -> dict[str, Result]:
    """Computes scores from what was collected.

    Args:
      names: of `METRICS`.
      images: of the images.
      reference: what they are compared with; None where no metric needs one.
      protocol: how.
      options: intervals and extrapolation.
      words: captions; None where no metric needs them.
      judged: GenEval's score and its shares by kinds of prompts.

    Raises:
      UserError: if a set is too small for a metric, or the reference lacks what it needs.
    """
    scores: dict[str, Result] = {}
    twos: dict[str, tuple[float, float]] = {}
    for name in names:
        output = output_of(name, protocol)
        if name == "is":
            values = images.classes[output].scores
            more = {"std": float(values.std()), "splits": len(values)}
            scores[name] = result(values.mean(), images.count, _spread(values), "splits, 95%", **more)
            continue
        if METRICS[name].form == VALUES:
            scores[name] = of_values(images.values[name])
            continue
        if METRICS[name].reference == "captions":
            assert words is not None
            scores[name] = _captioned(name, images.rows[output], words, options)
            continue
        if METRICS[name].form == JUDGED:
            assert judged is not None
            scores[name] = of_share(judged[0], images.count, tags=judged[1])
            continue
        assert reference is not None
        if METRICS[name].form == MOMENTS:
            scores[name] = _frechet(images, reference.gaussian(output), output, options)
        elif name == "kid":
            rows, others, draw = images.rows[output], reference.rows(output), protocol.kid
            values = kernels.kid(rows, others, draw)
            size = draw.size_of(len(rows), len(others))
            more = {"std": float(values.std()), "subsets": draw.count, "subset_size": size, "n_reference": len(others)}
            scores[name] = result(values.mean(), images.count, _spread(values), f"subsets of {size}, 95%", **more)
        elif name == "cmmd":
            others = reference.rows(output)
            value = kernels.cmmd(images.rows[output], others)
            scores[name] = result(value, images.count, None, "", n_reference=len(others))
        else:
            scores[name] = _manifold(name, images.rows[output], reference.rows(output), protocol, twos)
    return scores


@dataclasses.dataclass(frozen=True)
class Words:
    """Captions of the images, and CLIP's embeddings of them [N, E]."""

    captions: Sequence[str]
    embeddings_NE: np.ndarray


def _captioned(name: str, rows: kernels.Table, words: Words, options: Options) -> Result:
    embeddings_NE = rows.block(0, len(rows))
    if name == "clip_score":
        return of_values(captions.clip_scores(embeddings_NE, words.embeddings_NE))
    share, candidates = captions.r_precision(embeddings_NE, words.embeddings_NE, words.captions, options.seed)
    return of_share(share, len(rows), candidates=candidates)


def _frechet(images: Collected, other: frechet.Gaussian, output: Output, options: Options) -> Result:
    value = frechet.distance(frechet.Gaussian.of(images.moments[output]), other)
    more: Result = {"n_reference": other.count}
    interval = None
    if options.bootstrap:
        rng = np.random.default_rng(options.seed)
        rows = images.rows[output]
        draws = [
            frechet.distance(frechet.of_rows(rows, rng.integers(0, len(rows), len(rows))), other)
            for _ in range(options.bootstrap)
        ]
        # Resampling adds the bias of a smaller set: the interval is that of the differences, around the value.
        low, high = np.percentile(draws, [2.5, 97.5]) - np.mean(draws)
        interval = (value + low, value + high)
    if options.infinity:
        limit, points = frechet.infinity(images.rows[output], other, seed=options.seed)
        more["infinity"] = {"value": limit, "points": [list(point) for point in points]}
    return result(value, images.count, interval, f"bootstrap of {options.bootstrap}, 95%", **more)


def _manifold(
    name: str,
    rows: kernels.Table,
    others: kernels.Table,
    protocol: Protocol,
    twos: dict[str, tuple[float, float]],
) -> Result:
    """Metrics that come in twos are computed once."""
    first = name in ("precision", "recall")
    neighbours = protocol.neighbours if first else _DENSITY_NEIGHBOURS
    key = "precision" if first else "density"
    if key not in twos:
        function = precision_recall.precision_recall if first else precision_recall.density_coverage
        twos[key] = function(rows, others, neighbours)
    value = twos[key][0 if name in ("precision", "density") else 1]
    more = {"n_reference": len(others), "neighbours": neighbours}
    if name == "density":  # not a share: it may exceed 1
        return result(value, len(rows), None, "", **more)
    share = of_share(value, len(rows) if name == "precision" else len(others), **more)
    return share | {"n": len(rows)}
