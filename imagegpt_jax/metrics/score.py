"""The metrics of sets of images, each one entry of a table, and their values from what was gathered of the sets.

Importing this does not import JAX. Shapes: N images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from imagegpt_jax import plugins
from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import captions as captions_lib
from imagegpt_jax.metrics import frechet, kernels, precision_recall
from imagegpt_jax.metrics.feature_statistics import CLASSES, JUDGED, MOMENTS, ROWS, VALUES, FeatureStatistics, Output
from imagegpt_jax.metrics.metric import (
    CAPTIONS,
    IMAGES,
    NOTHING,
    PAIRS,
    PROMPTS,
    STATISTICS,
    Inputs,
    Metric,
    Options,
    Result,
    of_pairs,
    of_parts,
    of_share,
    of_values,
    result,
)

if TYPE_CHECKING:
    from imagegpt_jax.metrics.protocols import Protocol
    from imagegpt_jax.metrics.statistics_files import FileStatistics


def _frechet(x: Inputs) -> Result:
    assert x.reference is not None
    other, options = x.reference.gaussian(x.output), x.options
    value = frechet.distance(x.images.gaussian(x.output), other)
    more: Result = {"n_reference": other.count}
    interval = None
    if options.bootstrap:
        rng, rows = np.random.default_rng(options.seed), x.rows
        draws = [
            frechet.distance(frechet.of_rows(rows, rng.integers(0, len(rows), len(rows))), other)
            for _ in range(options.bootstrap)
        ]
        # Resampling adds the bias of a smaller set: the interval is that of the differences, around the value.
        low, high = np.percentile(draws, [2.5, 97.5]) - np.mean(draws)
        interval = (value + low, value + high)
    if options.infinity:
        limit, points = frechet.infinity(x.rows, other, seed=options.seed)
        more["infinity"] = {"value": limit, "points": [list(point) for point in points]}
    return result(value, x.images.count, interval, f"bootstrap of {options.bootstrap}, 95%", **more)


def _inception_score(x: Inputs) -> Result:
    values = x.images.classes[x.output].scores
    return of_parts(values, x.images.count, "splits", splits=len(values))


def _kid(x: Inputs) -> Result:
    rows, others, draw = x.rows, x.reference_rows, x.protocol.kid
    size = draw.size_of(len(rows), len(others))
    more = {"subsets": draw.count, "subset_size": size, "n_reference": len(others)}
    return of_parts(kernels.kid(rows, others, draw), x.images.count, f"subsets of {size}", **more)


def _cmmd(x: Inputs) -> Result:
    others = x.reference_rows
    return result(kernels.cmmd(x.rows, others), x.images.count, n_reference=len(others))


def _manifold(function: Callable[..., tuple[float, float]], at: int, neighbours: int, x: Inputs) -> Result:
    """One of two numbers of `precision_recall`, which are computed together; `neighbours` 0 is the protocol's number.

    Both are shares but for density, which may exceed 1: of the images, or of the references (`at` 1).
    """
    rows, others, neighbours = x.rows, x.reference_rows, neighbours or x.protocol.neighbours
    value = x.once(function.__name__, lambda: function(rows, others, neighbours))[at]
    more: Result = {"n_reference": len(others), "neighbours": neighbours}
    if function is precision_recall.density_coverage and at == 0:
        return result(value, len(rows), **more)
    return of_share(value, len(others) if at else len(rows), **more) | {"n": len(rows)}


def _clip_score(x: Inputs) -> Result:
    assert x.texts_NE is not None
    return of_values(captions_lib.clip_scores(x.rows.block(0, len(x.rows)), x.texts_NE))


def _r_precision(x: Inputs) -> Result:
    assert x.texts_NE is not None
    images_NE = x.rows.block(0, len(x.rows))
    share, candidates = captions_lib.r_precision(images_NE, x.texts_NE, x.captions, x.options.seed)
    return of_share(share, len(x.rows), candidates=candidates)


def _geneval(x: Inputs) -> Result:
    assert x.judged is not None
    return of_share(x.judged[0], x.images.count, tags=x.judged[1])


_PRECISION = functools.partial(_manifold, precision_recall.precision_recall)
_DENSITY = functools.partial(_manifold, precision_recall.density_coverage)
METRICS: Mapping[str, Metric] = {
    "fid": Metric(_frechet, "pool", MOMENTS, reference=STATISTICS, lower_is_better=True),
    "sfid": Metric(_frechet, "spatial", MOMENTS, reference=STATISTICS, lower_is_better=True),
    "is": Metric(_inception_score, "logits", CLASSES, reference=NOTHING),
    "kid": Metric(_kid, "pool", lower_is_better=True),
    "precision": Metric(functools.partial(_PRECISION, 0, 0), "pool"),
    "recall": Metric(functools.partial(_PRECISION, 1, 0), "pool"),
    "density": Metric(functools.partial(_DENSITY, 0, 5), "pool"),
    "coverage": Metric(functools.partial(_DENSITY, 1, 5), "pool"),
    "fd_dinov2": Metric(_frechet, "pool", MOMENTS, "dinov2", STATISTICS, lower_is_better=True),
    "cmmd": Metric(_cmmd, "embedding", network="clip", lower_is_better=True),
    "clip_score": Metric(_clip_score, "embedding", network="clip", reference=CAPTIONS),
    "r_precision": Metric(_r_precision, "embedding", network="clip", reference=CAPTIONS),
    "geneval": Metric(_geneval, form=JUDGED, reference=PROMPTS),
    "psnr": Metric(of_pairs, "", VALUES, "", PAIRS, "imagegpt_jax.metrics.reconstruction:psnr_B"),
    "ssim": Metric(of_pairs, "", VALUES, "", PAIRS, "imagegpt_jax.metrics.ssim:ssim", min_side=11),
    "ms_ssim": Metric(of_pairs, "", VALUES, "", PAIRS, "imagegpt_jax.metrics.ssim:ms_ssim", min_side=176),
    "lpips": Metric(of_pairs, "", VALUES, "lpips", PAIRS, "", min_side=31, lower_is_better=True),
}
NO_OPTIONS = Options()
NETWORKS = ("inception", "clip", "dinov2", "efficientnet_lite0", "lpips")
# Networks whose weights are not downloaded, and the files that they are in.
_FILES: Mapping[str, str] = {
    "clip": "model.safetensors of openai/clip-vit-base-patch32 or -large-patch14, or the folder that holds it",
    "dinov2": "model.safetensors of facebook/dinov2-large, or the folder that holds it",
    "lpips": "made by `python tools/convert_lpips.py`, or a folder of torchvision's and lpips' files",
}


def find(name: str) -> Metric:
    """The metric of a name of the table, or a user's own by "module:NAME"; raises UserError if there is none."""
    metric = plugins.resolve(name, "metric", METRICS)
    if not isinstance(metric, Metric):
        raise UserError(f"metric={name} is a {type(metric).__name__}: make it an imagegpt_jax.metrics.metric.Metric.")
    return metric


def check_metrics(names: Sequence[str]) -> None:
    """Raises UserError for a metric that there is not, or that comes twice."""
    for name in names:
        find(name)
    if len(set(names)) < len(names) or not names:
        raise UserError("--metrics names each metric once, such as --metrics=fid,is,kid.")


def require_weights(name: str, path: str) -> None:
    """Raises UserError if a network needs a file of weights and `path` is empty."""
    if name in _FILES and not path:
        raise UserError(f"no weights of {name}: give --feature_weights={name}=PATH, {_FILES[name]}.")


def output_of(name: str, protocol: Protocol) -> Output:
    """Network and output that a metric is computed from."""
    metric = find(name)
    return metric.network or protocol.features, metric.output


def paired(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the metrics that compare image with image, which takes a pass of its own."""
    return tuple(name for name in names if find(name).reference == PAIRS)


def check_side(names: Sequence[str], size: tuple[int, int]) -> None:
    """Raises UserError if the images are too small for a metric."""
    for name in names:
        if min(size) < (side := find(name).min_side):
            raise UserError(f"{name} needs images of {side} pixels a side, and these are {size[0]} x {size[1]}.")


def needs(names: Sequence[str], protocol: Protocol, options: Options, *, reference: bool) -> dict[str, list[Output]]:
    """Form -> the outputs that the metrics need of the images, or of the reference, in that form."""
    needed: dict[str, list[Output]] = {}
    for name in names:
        metric = find(name)
        if metric.form in (VALUES, JUDGED) or (reference and metric.reference not in (IMAGES, STATISTICS)):
            continue
        forms = [metric.form]
        if metric.form == MOMENTS and not reference and (options.bootstrap or options.infinity):
            forms.append(ROWS)
        for form in forms:
            if (output := output_of(name, protocol)) not in needed.setdefault(form, []):
                needed[form].append(output)
    return needed


def check_statistics(names: Sequence[str], statistics: FileStatistics, protocol: Protocol) -> None:
    """Raises UserError if a metric needs what a file of statistics does not hold."""
    for name in names:
        kind, output = find(name).reference, output_of(name, protocol)
        if kind == STATISTICS:
            statistics.gaussian(output)
        elif kind == PAIRS:
            raise UserError(f"{name} compares images one by one: give reference images, not statistics.")
        elif kind == IMAGES and statistics.images is None:
            statistics.features(output)


def compute(
    names: Sequence[str],
    images: FeatureStatistics,
    reference: FeatureStatistics | FileStatistics | None,
    protocol: Protocol,
    options: Options = NO_OPTIONS,
    captions: Sequence[str] = (),
    texts_NE: np.ndarray | None = None,
    judged: tuple[float, dict[str, float]] | None = None,
) -> dict[str, Result]:
    """Scores of what was gathered, see `metric.Inputs`; raises UserError if a set or the reference lacks something."""
    how = (images, reference, protocol, options, captions, texts_NE, judged, {})
    return {name: find(name).compute(Inputs(name, output_of(name, protocol), *how)) for name in names}
