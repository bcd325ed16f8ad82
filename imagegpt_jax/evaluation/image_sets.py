"""Scores folders and arrays of images: from the flags' values to the JSON that is written.

What is wrong is found before JAX starts, as far as it can be seen from the files' headers.
"""

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.evaluation import report as pages
from imagegpt_jax.evaluation.html import Report
from imagegpt_jax.metrics import captions, pairs, prompts, protocols, provenance, score, sets
from imagegpt_jax.metrics import warnings as mistakes
from imagegpt_jax.metrics.collected import MOMENTS, ROWS, VALUES, Collected
from imagegpt_jax.metrics.protocols import Protocol
from imagegpt_jax.plugins import plug_in
from imagegpt_jax.runtime.filesystem import write_whole

_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be scored.

    Attributes:
      images: folder or .npz.
      reference: folder, .npz, or statistics; "" for none.
      protocol: how.
      metrics: which.
      weights: name of a feature network -> file of its weights; "" is the public file, from the cache or downloaded.
      options: intervals and extrapolation.
      num_images: only so many images, the first ones; 0 is all.
      train_images: folder or .npz of images that were trained on, to look for in the reference; "" for none.
      statistics: file to write the statistics of `images` to, as a later reference; "" for none.
      batch_size: images that a process reads at once; 0 for the default.
      captions: file of captions; "" for those that the images bring.
      scorer: `module:function` that judges images for GenEval; "" for none.
      report: HTML file to write; "" for none.
      sweep: files of scores at other guidance scales, for the report.
    """

    images: str
    reference: str
    protocol: Protocol
    metrics: tuple[str, ...]
    weights: Mapping[str, str]
    options: score.Options
    num_images: int = 0
    train_images: str = ""
    statistics: str = ""
    batch_size: int = 0
    captions: str = ""
    scorer: str = ""
    report: str = ""
    sweep: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Opened:
    """The sets of a request."""

    images: sets.ImageSet
    reference: sets.ImageSet | sets.Statistics | None
    training: sets.ImageSet | None
    pairs: pairs.Pairs | None
    captions: Sequence[str]


def parse_weights(values: Sequence[str], features: str) -> dict[str, str]:
    """`FILE` (of the protocol's network) or `network=FILE` flags -> {network: file}.

    Raises:
      UserError: if a network is not known or comes twice, or a file is missing.
    """
    found: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or (name not in score.NETWORKS and epath.Path(value).exists()):
            name, path = features, value
        if name not in score.NETWORKS:
            raise UserError(f"--feature_weights={value} is of an unknown network.{suggest(name, score.NETWORKS)}")
        if name in found:
            raise UserError(f"--feature_weights names weights of {name} twice: {found[name]} and {path}.")
        if not epath.Path(path).exists():
            raise UserError(
                f"there are no feature weights at {path}: give the file by --feature_weights=FILE, or leave the flag"
                " out to download it."
            )
        found[name] = path
    return found


def open_sets(request: Request, reference: sets.ImageSet | sets.Statistics | None = None) -> Opened:
    """Opens and checks all sets, without JAX.

    Args:
      request: what is to be scored.
      reference: what `open_reference` has opened already; None opens it.

    Raises:
      UserError: if one cannot be scored.
    """
    reference = open_reference(request) if reference is None else reference
    images = sets.open_images(request.images, request.num_images, request.protocol.crop(request.protocol.image_crop))
    kinds = {name: score.METRICS[name].reference for name in request.metrics}
    training = None
    if request.train_images:
        training = sets.open_images(request.train_images, crop=request.protocol.crop(request.protocol.reference_crop))
    paired = tuple(name for name, kind in kinds.items() if kind == "pairs")
    both = None
    if paired:
        assert reference is not None
        assert not isinstance(reference, sets.Statistics)  # which `check` has refused
        both = pairs.Pairs(images, reference)
        pairs.check_side(paired, images.size)
    words = captions.read(images, request.captions) if "captions" in kinds.values() else ()
    return Opened(images, reference, training, both, words)


def open_reference(request: Request) -> sets.ImageSet | sets.Statistics | None:
    """Opens what images are compared with, None where nothing is, and checks everything but the images.

    Raises:
      UserError: if a metric lacks what it needs.
    """
    protocol = request.protocol
    score.check_metrics(request.metrics, tuple(score.METRICS))
    for name in request.metrics:
        network = name if name == "lpips" else score.METRICS[name].network
        score.require_weights(network, request.weights.get(network, ""))
    needed = {name: score.METRICS[name].reference for name in request.metrics}
    compared = [name for name, kind in needed.items() if kind not in ("", "captions", "prompts")]
    if compared and not request.reference:
        raise UserError(
            f"{', '.join(compared)} need{'s' if len(compared) == 1 else ''} --reference=DIR|NPZ: what the images are"
            f" compared with, for {protocol.name} {protocol.reference}."
        )
    if "prompts" in needed.values():
        if not request.scorer or not request.captions:
            raise UserError(
                "geneval needs --captions=evaluation_metadata.jsonl and --scorer=module:function, which judges an image"
                " (uint8 [H, W, 3]) by its prompt's row."
            )
        plug_in(request.scorer, "scorer")
        prompts.geneval(request.captions)
    for path in request.sweep:
        pages.guided(path, protocol)
    if not compared:
        return None
    reference = sets.open_reference(request.reference, protocol.crop(protocol.reference_crop))
    if isinstance(reference, sets.Statistics):
        made_by = reference.about.get("protocol", protocol.name)
        if made_by != protocol.name:
            raise UserError(
                f"{reference.path} holds statistics by the protocol {made_by}, not {protocol.name}:"
                f" {'; '.join(protocols.differences(protocols.find(made_by).facts(), protocol.facts()))}."
            )
        score.Reference(reference, protocol.features).check(compared, protocol)
    return reference


def run(request: Request, opened: Opened) -> dict[str, Any]:
    """Scores together with the other processes.

    Returns:
      metric -> {"value", "n", "interval", "interval_of", ...}, and "provenance".

    Raises:
      UserError: if weights are missing, an image is damaged, or a set is too small.
    """
    import jax

    from imagegpt_jax.metrics import networks
    from imagegpt_jax.metrics.feature_statistics import collect
    from imagegpt_jax.runtime import distributed

    started = time.monotonic()
    protocol, options = request.protocol, request.options
    needs = score.needs(request.metrics, protocol, options, reference=False)
    if request.statistics:
        for output in _kept(request):
            if output not in needs.setdefault(MOMENTS, []):
                needs[MOMENTS].append(output)
    names = sorted({output[0] for wanted in needs.values() for output in wanted})
    loaded = [networks.load(name, request.weights.get(name, ""), protocol.resize) for name in names]
    paired = [name for name in request.metrics if score.METRICS[name].reference == "pairs"]
    if paired:
        loaded.append(networks.pairs(paired, request.weights.get("lpips", "")))

    def passed(role: str, images: sets.ImageSet, wanted: Mapping[str, Any]) -> Collected:
        used = {output[0] for outputs in wanted.values() for output in outputs}
        with _progress(role, len(images)) as advance:
            return collect(
                images,
                wanted,
                [network for network in loaded if network.name in used],
                protocol,
                batch_size=request.batch_size or _BATCH_SIZE,
                advance=advance,
            )

    found = passed("images", opened.images, needs)
    warnings = mistakes.of_set("images", opened.images, found, protocol)
    compared: Collected | sets.Statistics | None = None
    sizes = {"images": opened.images.size}
    beside: Collected | None = None
    about: dict[str, Any] = {}
    if isinstance(opened.reference, sets.Statistics):
        compared = opened.reference
        _check_weights(compared, loaded, protocol.features)
        about = {"path": compared.path, "n": compared.count, "sha256": compared.sha256, **compared.about}
        wanted = score.needs(request.metrics, protocol, options, reference=True)
        if compared.images is not None and wanted.get(ROWS):
            beside = passed("reference", compared.images, {ROWS: wanted[ROWS]})
            about["images"] = provenance.of_set(compared.images, beside.sha256)
    elif opened.reference is not None:
        compared = passed(
            "reference", opened.reference, score.needs(request.metrics, protocol, options, reference=True)
        )
        sizes["reference"] = opened.reference.size
        about = provenance.of_set(opened.reference, compared.sha256)
        warnings += mistakes.of_set("reference", opened.reference, compared, protocol)
        if opened.training is not None:
            warnings += mistakes.of_training(compared, set(passed("train images", opened.training, {}).keys()))
    warnings += mistakes.of_scores(request.metrics, found, compared, protocol, sizes)

    if opened.pairs is not None:
        found.values = passed("pairs", opened.pairs, {VALUES: [("pairs", name) for name in paired]}).values

    # Every process has seen the same features; one of them is enough for what follows.
    scores: dict[str, Any] = {}
    if distributed.is_main_process():
        against = None if compared is None else score.Reference(compared, protocol.features, beside)
        words = None
        if opened.captions:
            texts = [protocol.prefix + text for text in opened.captions]
            words = score.Words(opened.captions, networks.embed_texts(request.weights["clip"], texts))
        judged = _judge(request, opened.images) if "geneval" in request.metrics else None
        scores = score.compute(request.metrics, found, against, protocol, options, words, judged)
        if request.statistics:
            _write_statistics(request, found, {n.name: n.about["sha256"] for n in loaded})
    scores["provenance"] = {
        "protocol": protocol.facts(),
        "images": provenance.of_set(opened.images, found.sha256),
        "reference": about,
        "feature_weights": {network.name: dict(network.about) for network in loaded if network.about},
        **provenance.drawn_by(opened.images),
        "seed": options.seed,
        "bootstrap": options.bootstrap,
        **provenance.code(),
        "jax_version": jax.__version__,
        "platform": jax.default_backend(),
        "processes": jax.process_count(),
        "seconds": round(time.monotonic() - started, 3),
        "warnings": warnings,
    }
    if request.report and distributed.is_main_process():
        write_whole(epath.Path(request.report), _page(request, opened, scores, found))
    for collected in (found, compared, beside):
        if isinstance(collected, Collected):
            collected.close()
    return scores


def of_sets(request: Request, images: sets.ImageSet, reference: sets.ImageSet) -> dict[str, Any]:
    """Scores sets that are not folders, such as what a tokenizer makes of a data source.

    Args:
      request: protocol, metrics and weights; its `images` and `reference` are not read.
      images: what is scored.
      reference: what it is compared with.

    Returns:
      as `run`.

    Raises:
      UserError: as `run`.
    """
    paired = tuple(name for name in request.metrics if score.METRICS[name].reference == "pairs")
    pairs.check_side(paired, images.size)
    return run(request, Opened(images, reference, None, pairs.Pairs(images, reference) if paired else None, ()))


def _check_weights(statistics: sets.Statistics, networks: Sequence[Any], features: str) -> None:
    made_with = statistics.about.get("weights_sha256")
    for network in networks:
        if network.name == features and made_with not in (None, network.about["sha256"]):
            raise UserError(
                f"{statistics.path} was made with other weights of {features} ({made_with}) than"
                f" {network.about['path']} ({network.about['sha256']}): make it again, or give those weights."
            )


def _judge(request: Request, images: sets.ImageSet) -> tuple[float, dict[str, float]]:
    rows, judge = prompts.geneval(request.captions), plug_in(request.scorer, "scorer")
    each = max(1, len(images) // len(rows))
    right = [judge(images.read(i), rows[min(i // each, len(rows) - 1)]) for i in range(len(images))]
    return prompts.geneval_score(right, rows)


def _page(request: Request, opened: Opened, scores: Mapping[str, Any], found: Collected) -> str:
    page = Report(f"Scores of {request.images}")
    pages.scores_of(page, scores)
    words = opened.captions or (captions.known(opened.images) if not request.captions else ())
    pages.samples(page, opened.images, words)
    if opened.training is not None:
        pages.neighbours(page, opened.images, opened.training)
    for name, values in found.values.items():
        assert opened.reference is not None
        assert not isinstance(opened.reference, sets.Statistics)
        pages.worst(page, opened.images, opened.reference, name, values)
    if request.sweep:
        pages.sweep(page, [*(pages.guided(path, request.protocol) for path in request.sweep), scores])
    pages.made_of(page, scores["provenance"])
    return page.html()


def _kept(request: Request) -> list[tuple[str, str]]:
    """Outputs whose statistics are written."""
    features = request.protocol.features
    return [(features, "pool"), *([(features, "spatial")] if features == "inception" else [])]


def _write_statistics(request: Request, found: Any, weights: Mapping[str, str]) -> None:
    """Writes means and covariances under the keys that ADM's files have, with what they are of."""
    arrays: dict[str, Any] = {"n": np.int64(found.count)}
    for (_, output), suffix in zip(_kept(request), ("", "_s"), strict=False):
        moments = found.moments[request.protocol.features, output]
        arrays |= {f"mu{suffix}": moments.mean, f"sigma{suffix}": moments.covariance}
    about = {
        "protocol": request.protocol.name,
        "images_sha256": found.sha256,
        "weights_sha256": weights[request.protocol.features],
        **provenance.code(),
    }
    out = io.BytesIO()
    np.savez(out, about=np.array(json.dumps(about)), **arrays)
    write_whole(epath.Path(request.statistics), out.getvalue())


@contextlib.contextmanager
def _progress(name: str, count: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(desc=name, unit="image", total=count, mininterval=1.0) as bar:
        yield bar.update


def table(scores: Mapping[str, Any]) -> str:
    """The scores for a terminal, warnings first."""
    about = scores["provenance"]
    lines = [mistakes.lines(about["warnings"])] if about["warnings"] else []
    lines.append(f"protocol {about['protocol']['name']}, {about['images']['n']} images of {about['images']['path']}")
    for name, found in scores.items():
        if name != "provenance":
            ends = found["interval"]
            text = f"  [{ends[0]:.6g}, {ends[1]:.6g}] {found['interval_of']}" if ends else ""
            lines.append(f"  {name:<12}{found['value']:>14.6g}{text}")
            if "infinity" in found:
                lines.append(f"  {name + ', n -> oo':<12}{found['infinity']['value']:>12.6g}")
    return "\n".join(lines)
