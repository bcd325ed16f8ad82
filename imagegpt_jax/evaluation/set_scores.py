"""Scores of sets of images that are in no file, as a checkpoint's scores: one flat mapping."""

from collections.abc import Sequence

from imagegpt_jax.evaluation import image_sets
from imagegpt_jax.evaluation.checkpoint_data import Scores, Settings
from imagegpt_jax.metrics import protocols
from imagegpt_jax.metrics.metric import Options
from imagegpt_jax.metrics.sets import ImageSet


def score_sets(settings: Settings, prefix: str, names: Sequence[str], images: ImageSet, reference: ImageSet) -> Scores:
    """Metrics of image sets, such as rFID or KID, under the names `prefix/metric`; errors as `image_sets.run`."""
    protocol = protocols.find(settings.protocol)
    request = image_sets.Request(
        images=images.path,
        reference=reference.path,
        protocol=protocol,
        metrics=tuple(names),
        weights=settings.weights,
        options=Options(seed=settings.seed),
    )
    results = image_sets.run(request, image_sets.with_pairs(request, images, reference))
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
