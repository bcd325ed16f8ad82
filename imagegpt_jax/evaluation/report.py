"""What goes onto the pages: of scored image sets, and of scored checkpoints.

Shapes: N images, H W pixels, K codes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from imagegpt_jax.errors import UserError
from imagegpt_jax.evaluation.html import Report, curves, histogram
from imagegpt_jax.images import Tile
from imagegpt_jax.metrics import provenance, retrieval, score
from imagegpt_jax.metrics.protocols import Protocol
from imagegpt_jax.metrics.sets import ImageSet

SAMPLES, NEIGHBOURS, WORST = 32, 12, 12
_SEARCHED = 20_000  # training images that are searched for neighbours, at most
_CHUNK = 512


def scores_of(page: Report, scores: Mapping[str, Any]) -> None:
    """Adds scores with their intervals, and what they were made of."""
    rows = []
    for name, result in scores.items():
        if name == "provenance":
            continue
        ends = result["interval"]
        text = f"[{ends[0]:.6g}, {ends[1]:.6g}]" if ends else ""
        rows.append((name, f"{result['value']:.6g}", text, result["n"], result["interval_of"]))
        if "infinity" in result:
            rows.append((f"{name}, n to infinity", f"{result['infinity']['value']:.6g}", "", result["n"], ""))
    page.table("Scores", ("metric", "value", "interval", "images", "interval of"), rows)
    page.warnings(scores["provenance"]["warnings"])


def made_of(page: Report, about: Mapping[str, Any]) -> None:
    """Adds the provenance, key by key."""
    rows: list[tuple[str, str]] = []

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                walk(item, f"{name}.{key}" if name else key)
        elif name != "warnings":
            rows.append((name, value if isinstance(value, str) else json.dumps(value)))

    walk(about, "")
    page.table("What was measured", ("key", "value"), rows)


def samples(page: Report, images: ImageSet, captions: Sequence[str]) -> None:
    """Adds the first images with their captions."""
    count = min(SAMPLES, len(images))
    shown = [Tile((captions or images.names)[i], [images.read(i)]) for i in range(count)]
    page.gallery("Samples", shown, f"the first {count} of {len(images)}")


def neighbours(page: Report, images: ImageSet, training: ImageSet) -> None:
    """Adds the training image nearest to each of some images: what was memorised looks the same."""
    count = min(NEIGHBOURS, len(images))
    chosen = np.unique(np.linspace(0, len(images) - 1, count).astype(int)).tolist()

    def thumbnails(source: ImageSet, numbers: Sequence[int]) -> np.ndarray:
        pictures = np.stack([source.read(number) for number in numbers])
        return retrieval.box_downsample(pictures).reshape(len(numbers), -1)

    wanted = thumbnails(images, chosen)
    best, nearest = np.full(len(chosen), np.inf), np.zeros(len(chosen), int)
    searched = min(_SEARCHED, len(training))
    for start in range(0, searched, _CHUNK):
        rows = thumbnails(training, range(start, min(start + _CHUNK, searched)))
        for i, picture in enumerate(wanted):
            distance = np.mean(np.square(rows - picture), axis=1)
            if distance.min() < best[i]:
                best[i], nearest[i] = distance.min(), start + int(distance.argmin())
    copies = {number: training.read(number) for number in sorted(set(nearest.tolist()))}  # in order: a set may stream
    shown = [
        Tile(f"{images.names[i]} and {training.names[j]}, distance {d**0.5:.2f}", [images.read(i), copies[j]])
        for i, j, d in zip(chosen, nearest.tolist(), best, strict=True)
    ]
    note = (
        f"each image beside the nearest of {searched} training images, by 16 x 16 pixels (root mean square, 0 to 255)"
    )
    page.gallery("Nearest training images", shown, note)


def worst(page: Report, images: ImageSet, references: ImageSet, metric: str, values_N: np.ndarray) -> None:
    """Adds the pairs that a metric likes least."""
    order = np.argsort(-values_N if score.find(metric).lower_is_better else values_N)[:WORST].tolist()
    shown = [
        Tile(f"{images.names[i]}: {metric} {values_N[i]:.4g}", [references.read(i), images.read(i)]) for i in order
    ]
    page.gallery("Worst pairs", shown, f"reference beside image, by {metric}")


def worst_reconstructions(page: Report, pairs_n: np.ndarray, psnr_n: np.ndarray) -> None:
    """Adds the images that a tokenizer reproduces worst."""
    shown = [Tile(f"PSNR {psnr:.2f} dB", pair) for pair, psnr in zip(pairs_n, psnr_n, strict=True)]
    page.gallery("Worst reconstructions", shown, "image beside its reconstruction, lowest PSNR first")


def guided(path: str, protocol: Protocol) -> Mapping[str, Any]:
    """Scores of a file for a sweep; raises UserError for another protocol, or images that do not say their guidance."""
    scores = provenance.read(path)
    about = scores["provenance"]
    if about["protocol"] != json.loads(json.dumps(protocol.facts())):
        raise UserError(f"{path} is of another protocol than {protocol.name}: a sweep is of one.")
    if about["sampler"].get("cfg_scale") is None:
        raise UserError(f"{path} does not say at which cfg_scale its images were drawn: score what `sample` drew.")
    return scores


def sweep(page: Report, every: Sequence[Mapping[str, Any]]) -> None:
    """Adds curves of scores against the guidance scale, a point for each of `every` scores that says its guidance."""
    points: dict[str, list[tuple[float, float]]] = {}
    for scores in every:
        scale = scores["provenance"]["sampler"].get("cfg_scale")
        for name, result in scores.items():
            if name != "provenance" and scale is not None:
                points.setdefault(name, []).append((float(scale), result["value"]))
    for name, line in points.items():
        x, y = zip(*sorted(line), strict=True)
        page.section(f"{name} against guidance", curves({name: (x, y)}, "cfg_scale", name))


def codes(page: Report, counts_K: np.ndarray) -> None:
    """Adds how often each code was used, most used first."""
    used = int(np.sum(np.asarray(counts_K) > 0))
    note = f"{used} of {len(counts_K)} codes used; most used first"
    page.section("Codebook use", histogram(np.sort(counts_K)[::-1], "codes", "times used"), note)


def losses(page: Report, workdir: str) -> None:
    """Adds the curves of a training run's `metrics.jsonl`, one chart for each scalar whose name speaks of a loss."""
    file = epath.Path(workdir) / "metrics.jsonl"
    if not file.exists():
        return
    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if "loss" in name and isinstance(value, int | float):
                x, y = series.setdefault(name, ([], []))
                x.append(float(row.get("step", len(x))))
                y.append(float(value))
    for name, pair in series.items():
        page.section(f"{name} of {workdir}", curves({name: pair}, "step", name))
