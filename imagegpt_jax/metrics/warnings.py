"""Named warnings of what commonly makes scores wrong, for people to read and programs to look for."""

from collections.abc import Collection, Mapping, Sequence

from imagegpt_jax.metrics import score
from imagegpt_jax.metrics.feature_statistics import CLASSES, MOMENTS, FeatureStatistics
from imagegpt_jax.metrics.protocols import Protocol
from imagegpt_jax.metrics.sets import ImageSet
from imagegpt_jax.metrics.statistics_files import FileStatistics

FEW = 10_000  # images below which FID's bias dwarfs what models differ by
_LOSSY = ("JPEG", "WEBP")
Warnings = list[dict[str, str]]


def _named(texts: Mapping[str, str]) -> Warnings:
    """Warnings as they are written; those without a text do not apply."""
    return [{"name": name, "text": text} for name, text in texts.items() if text]


def of_set(role: str, images: ImageSet, gathered: FeatureStatistics, protocol: Protocol) -> Warnings:
    """What is odd about one set, whose role is "images" or "reference", by its statistics."""
    texts = {}
    count = sum(images.formats.get(kind, 0) for kind in _LOSSY)
    looked_at, like = gathered.checked, gathered.jpeg_like
    if protocol.lossless and role == "images":  # photographs to compare with may well be JPEG
        if count:
            texts["lossy_format"] = f"{role}: {count} of {len(images)} files are JPEG or WebP; save samples as PNG."
        elif like * 2 > looked_at:
            texts["jpeg_artefacts"] = (
                f"{role}: {like} of {looked_at} images that were looked at have the block pattern of JPEG, though they"
                " are stored without loss: they were JPEG once, which FID notices."
            )
    (height, width), side = images.size, protocol.side
    if side and (height, width) != (side, side):
        texts["wrong_size"] = f"{role}: images are {height} x {width}, and {protocol.name} is of {side} x {side}."
    if copies := gathered.duplicates:
        texts["duplicates"] = f"{role}: {copies} of {gathered.count} images are copies of others to the bit."
    return _named(texts)


def of_scores(
    names: Sequence[str],
    images: FeatureStatistics,
    reference: FeatureStatistics | FileStatistics | None,
    protocol: Protocol,
    sizes: Mapping[str, tuple[int, int]],
) -> Warnings:
    """What is odd about a comparison; `sizes` has those of "images" and, where it is one of images, "reference"."""
    texts = {}
    forms, count = {score.find(name).form for name in names}, images.count
    if MOMENTS in forms and count < FEW:
        texts["few_samples"] = (
            f"FID of {count} images: below {FEW:,} it is mostly bias; compare only with scores of as many, or use KID."
        )
    parts = protocol.inception.of(count)
    if CLASSES in forms and count < 2 * parts:
        texts["small_splits"] = (
            f"IS of {count} images in {parts} splits: a split of one image scores 1; give --is_splits=1."
        )
    if protocol.count and count != protocol.count:
        texts["wrong_count"] = f"{count} images, and published scores of {protocol.name} are of {protocol.count:,}."
    if len(set(sizes.values())) > 1:
        a, b = sizes["images"], sizes["reference"]
        texts["unequal_sizes"] = (
            f"images are {a[0]} x {a[1]} and reference images {b[0]} x {b[1]}: each is resized on its own."
        )
    if isinstance(reference, FeatureStatistics) and (common := len(set(images.keys()) & set(reference.keys()))):
        texts["overlap"] = f"{common} images are in the reference too, to the bit."
    return _named(texts)


def of_training(reference: FeatureStatistics, training: Collection[bytes]) -> Warnings:
    """Whether training images are in the reference."""
    common = sum(key in training for key in reference.keys())  # noqa: SIM118 - not a mapping
    text = f"{common} of {reference.count} reference images were trained on: the score measures memory as well."
    return _named({"train_images": text if common else ""})
