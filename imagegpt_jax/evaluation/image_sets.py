"""Scores folders and arrays of images: from the flags' values to the JSON that is written.

What is wrong is found before JAX starts, as far as it can be seen from the files' headers.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from imagegpt_jax import plugins
from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.evaluation import report as pages
from imagegpt_jax.evaluation.checkpoint_data import Scores, Settings
from imagegpt_jax.evaluation.html import Report
from imagegpt_jax.metrics import captions, prompts, protocols, provenance, score, sets, warnings
from imagegpt_jax.metrics.feature_statistics import JUDGED, ROWS, FeatureStatistics
from imagegpt_jax.metrics.metric import CAPTIONS, NOTHING, PROMPTS, Options
from imagegpt_jax.metrics.pairs import Pairs
from imagegpt_jax.metrics.protocols import Protocol
from imagegpt_jax.metrics.statistics_files import FileStatistics, write_statistics
from imagegpt_jax.runtime import distributed, filesystem

if TYPE_CHECKING:
    from imagegpt_jax.metrics.set_scorer import SetScorer


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be scored: the flags of `evaluate` of the same names, whose help says what they mean; "" for none.

    Attributes:
      weights: name of a feature network -> file of its weights; "" is the public file, from the cache or downloaded.
      options: intervals and extrapolation.
      captions: file of captions; "" for those that the images bring.
    """

    images: str
    reference: str
    protocol: Protocol
    metrics: tuple[str, ...]
    weights: Mapping[str, str]
    options: Options
    num_images: int = 0
    train_images: str = ""
    statistics_output: str = ""
    batch_size: int = 0
    captions: str = ""
    scorer: str = ""
    report: str = ""
    sweep: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Opened:
    """The sets of a request."""

    images: sets.ImageSet
    reference: sets.ImageSet | FileStatistics | None
    training: sets.ImageSet | None = None
    pairs: Pairs | None = None
    captions: Sequence[str] = ()


def parse_weights(values: Sequence[str], features: str) -> dict[str, str]:
    """`FILE` (of the protocol's network) or `network=FILE` flags -> {network: file}; raises UserError for others."""
    weights: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or (name not in score.NETWORKS and epath.Path(value).exists()):
            name, path = features, value
        if name not in score.NETWORKS:
            raise UserError(f"--feature_weights={value} is of an unknown network.{suggest(name, score.NETWORKS)}")
        if name in weights:
            raise UserError(f"--feature_weights names weights of {name} twice: {weights[name]} and {path}.")
        if not epath.Path(path).exists():
            raise UserError(
                f"there are no feature weights at {path}: give the file by --feature_weights=FILE, or leave the flag"
                " out to download it."
            )
        weights[name] = path
    return weights


def open_sets(request: Request, reference: sets.ImageSet | FileStatistics | None = None) -> Opened:
    """Opens and checks all sets, without JAX; `reference` is open already; raises UserError if one cannot be scored."""
    protocol = request.protocol
    reference = open_reference(request) if reference is None else reference
    images = sets.open_images(request.images, request.num_images, protocol.crop(protocol.image_crop))
    training = None
    if request.train_images:
        training = sets.open_images(request.train_images, crop=protocol.crop(protocol.reference_crop))
    of_captions = any(score.find(name).reference == CAPTIONS for name in request.metrics)
    words = captions.read(images, request.captions) if of_captions else ()
    return Opened(images, reference, training, _pairs(request, images, reference), words)


def _pairs(request: Request, images: sets.ImageSet, reference: Any) -> Pairs | None:
    """Two sets as pairs, which `open_reference` has seen to be images, where metrics compare image with image."""
    paired = score.paired(request.metrics)
    both = Pairs(images, reference) if paired else None
    score.check_side(paired, images.size)
    return both


def open_reference(request: Request) -> sets.ImageSet | FileStatistics | None:
    """Opens what images are compared with, if anything; raises UserError if a metric lacks what it needs besides."""
    protocol = request.protocol
    score.check_metrics(request.metrics)
    needed = {name: score.find(name).reference for name in request.metrics}
    for name in request.metrics:
        network = score.find(name).network
        score.require_weights(network, request.weights.get(network, ""))
    compared = [name for name, kind in needed.items() if kind not in (NOTHING, CAPTIONS, PROMPTS)]
    if compared and not request.reference:
        raise UserError(
            f"{', '.join(compared)} need{'s' if len(compared) == 1 else ''} --reference=DIR|NPZ: what the images are"
            f" compared with, for {protocol.name} {protocol.reference}."
        )
    if PROMPTS in needed.values():
        if not request.scorer or not request.captions:
            raise UserError(
                "geneval needs --captions=evaluation_metadata.jsonl and --scorer=module:function, which judges an image"
                " (uint8 [H, W, 3]) by its prompt's row."
            )
        plugins.plug_in(request.scorer, "scorer")
        prompts.geneval(request.captions)
    for path in request.sweep:
        pages.guided(path, protocol)
    if not compared:
        return None
    reference = sets.open_reference(request.reference, protocol.crop(protocol.reference_crop), protocol.features)
    if isinstance(reference, FileStatistics):
        made_by = reference.about.get("protocol", protocol.name)
        if made_by != protocol.name:
            raise UserError(
                f"{reference.path} holds statistics by the protocol {made_by}, not {protocol.name}:"
                f" {'; '.join(protocols.differences(protocols.find(made_by).facts(), protocol.facts()))}."
            )
        score.check_statistics(compared, reference, protocol)
    return reference


def run(request: Request, opened: Opened) -> dict[str, Any]:
    """Scores together with the other processes.

    Returns:
      metric -> {"value", "n", "interval", "interval_of", ...}, and "provenance".

    Raises:
      UserError: if weights are missing, an image is damaged, or a set is too small.
    """
    import jax

    from imagegpt_jax.metrics import set_scorer

    started = time.monotonic()
    protocol, options = request.protocol, request.options
    scorer = set_scorer.SetScorer(
        request.metrics,
        protocol,
        request.weights,
        options,
        captions=opened.captions,
        batch_size=request.batch_size or set_scorer.BATCH_SIZE,
        besides=_written(protocol) if request.statistics_output else (),
        progress=True,
    )
    images = scorer.gather("images", opened.images)
    notes = warnings.of_set("images", opened.images, images, protocol)
    reference, about, of_reference = _gather_reference(scorer, opened)
    sizes = {"images": opened.images.size}
    if opened.reference is not None and not isinstance(opened.reference, FileStatistics):
        sizes["reference"] = opened.reference.size
    notes += of_reference + warnings.of_scores(request.metrics, images, reference, protocol, sizes)
    if opened.pairs is not None:
        images.values = scorer.gather("pairs", opened.pairs).values

    # Every process has seen the same features; one of them is enough for what follows.
    scores: dict[str, Any] = {}
    if distributed.is_main_process():
        judged = _judge(request, opened.images) if any(score.find(n).form == JUDGED for n in request.metrics) else None
        scores = scorer.scores(images, reference, judged)
        if request.statistics_output:
            _write_statistics(request, images, {n.name: n.about["sha256"] for n in scorer.networks})
    scores["provenance"] = {
        "protocol": protocol.facts(),
        "images": provenance.of_set(opened.images, images.sha256),
        "reference": about,
        "feature_weights": {network.name: dict(network.about) for network in scorer.networks if network.about},
        **provenance.drawn_by(opened.images),
        "seed": options.seed,
        "bootstrap": options.bootstrap,
        **provenance.code(),
        "jax_version": jax.__version__,
        "platform": jax.default_backend(),
        "processes": jax.process_count(),
        "seconds": round(time.monotonic() - started, 3),
        "warnings": notes,
    }
    if request.report and distributed.is_main_process():
        filesystem.write_whole(request.report, _page(request, opened, scores, images))
    for statistics in (images, reference, getattr(reference, "beside", None)):
        if isinstance(statistics, FeatureStatistics):
            statistics.close()
    return scores


def _gather_reference(
    scorer: "SetScorer", opened: Opened
) -> tuple[FeatureStatistics | FileStatistics | None, dict[str, Any], warnings.Warnings]:
    """The statistics of the reference, which it is, and warnings of it."""
    reference = opened.reference
    if reference is None:
        return None, {}, []
    if not isinstance(reference, FileStatistics):
        gathered = scorer.gather("reference", reference)
        notes = warnings.of_set("reference", reference, gathered, scorer.protocol)
        if opened.training is not None:
            training = scorer.gather("train images", opened.training)
            notes += warnings.of_training(gathered, set(training.keys()))
        return gathered, provenance.of_set(reference, gathered.sha256), notes
    made_with = reference.about.get("weights_sha256")
    for network in scorer.networks:
        if network.name == scorer.protocol.features and made_with not in (None, network.about["sha256"]):
            raise UserError(
                f"{reference.path} was made with other weights of {network.name} ({made_with}) than"
                f" {network.about['path']} ({network.about['sha256']}): make it again, or give those weights."
            )
    about = {"path": reference.path, "n": reference.count, "sha256": reference.sha256, **reference.about}
    if reference.images is not None and scorer.needs["reference"].get(ROWS):
        beside = scorer.gather("reference", reference.images, (ROWS,))
        about["images"] = provenance.of_set(reference.images, beside.sha256)
        reference = dataclasses.replace(reference, beside=beside)
    return reference, about, []


def score_sets(
    settings: Settings, prefix: str, names: Sequence[str], images: sets.ImageSet, reference: sets.ImageSet
) -> Scores:
    """Scores of sets that are in no file, as a checkpoint's scores, by the names `prefix/metric`; errors as `run`."""
    protocol, options = protocols.find(settings.protocol), Options(seed=settings.seed)
    request = Request(images.path, reference.path, protocol, tuple(names), settings.weights, options)
    results = run(request, Opened(images, reference, pairs=_pairs(request, images, reference)))
    about = results.pop("provenance")
    scores: Scores = {}
    for name, result in results.items():
        scores[name] = result["value"]
        if result["interval"]:
            scores[f"{name}_low"], scores[f"{name}_high"] = result["interval"]
    scores |= {
        "protocol": protocol.name,
        "images": about["images"]["n"],
        "reference_images": about["reference"]["n"],
        "reference_sha256": about["reference"]["sha256"],
    }
    scores |= {f"{name}_sha256": weights["sha256"] for name, weights in about["feature_weights"].items()}
    return {f"{prefix}/{name}": value for name, value in scores.items()}


def _judge(request: Request, images: sets.ImageSet) -> tuple[float, dict[str, float]]:
    rows, judge = prompts.geneval(request.captions), plugins.plug_in(request.scorer, "scorer")
    each = max(1, len(images) // len(rows))
    right = [judge(images.read(i), rows[min(i // each, len(rows) - 1)]) for i in range(len(images))]
    return prompts.geneval_score(right, rows)


def _page(request: Request, opened: Opened, scores: Mapping[str, Any], images: FeatureStatistics) -> str:
    page = Report(f"Scores of {request.images}")
    pages.scores_of(page, scores)
    words = opened.captions or (captions.known(opened.images) if not request.captions else ())
    pages.samples(page, opened.images, words)
    if opened.training is not None:
        pages.neighbours(page, opened.images, opened.training)
    for name, values in images.values.items():
        assert opened.reference is not None
        assert not isinstance(opened.reference, FileStatistics)
        pages.worst(page, opened.images, opened.reference, name, values)
    if request.sweep:
        pages.sweep(page, [*(pages.guided(path, request.protocol) for path in request.sweep), scores])
    pages.made_of(page, scores["provenance"])
    return page.html()


def _written(protocol: Protocol) -> tuple[str, ...]:
    """Metrics of which statistics are written."""
    return ("fid", "sfid") if protocol.features == "inception" else ("fid",)


def _write_statistics(request: Request, images: FeatureStatistics, weights: Mapping[str, str]) -> None:
    """Writes means and covariances under the keys that ADM's files have, with what they are of."""
    about = {
        "protocol": request.protocol.name,
        "images_sha256": images.sha256,
        "weights_sha256": weights[request.protocol.features],
        **provenance.code(),
    }
    outputs = [score.output_of(name, request.protocol) for name in _written(request.protocol)]
    moments = {output[1]: images.moments[output] for output in outputs}
    write_statistics(request.statistics_output, images.count, moments, about)


def table(scores: Mapping[str, Any]) -> str:
    """The scores for a terminal, warnings first."""
    about = scores["provenance"]
    lines = [f"warning ({warning['name']}): {warning['text']}" for warning in about["warnings"]]
    lines.append(f"protocol {about['protocol']['name']}, {about['images']['n']} images of {about['images']['path']}")
    for name, result in scores.items():
        if name != "provenance":
            ends = result["interval"]
            text = f"  [{ends[0]:.6g}, {ends[1]:.6g}] {result['interval_of']}" if ends else ""
            lines.append(f"  {name:<12}{result['value']:>14.6g}{text}")
            if "infinity" in result:
                lines.append(f"  {name + ', n -> oo':<12}{result['infinity']['value']:>12.6g}")
    return "\n".join(lines)
