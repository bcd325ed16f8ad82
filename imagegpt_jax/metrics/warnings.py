"""Named warnings of the classic mistakes that make scores wrong, for people to read and programs to look for."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from imagegpt_jax.metrics.collected import Collected
from imagegpt_jax.metrics.protocols import Protocol
from imagegpt_jax.metrics.sets import ImageSet, Statistics, lossy

FEW = 10_000  # images below which FID's bias dwarfs what models differ by
_FRECHET = ("fid", "sfid", "fd_dinov2")
Note = dict[str, str]


def warning(name: str, text: str) -> Note:
    """A warning as it is written."""
    return {"name": name, "text": text}


def of_set(role: str, images: ImageSet, found: Collected, protocol: Protocol) -> list[Note]:
    """What is odd about one set.

    Args:
      role: "images" or "reference".
      images: the set.
      found: what was collected of it.
      protocol: what it should be like.
    """
    warnings = []
    lossless = protocol.lossless and role == "images"  # photographs to compare with may well be JPEG
    count = lossy(images)
    if count and lossless:
        warnings.append(
            warning("lossy_format", f"{role}: {count} of {len(images)} files are JPEG or WebP; save samples as PNG.")
        )
    elif found.jpeg_like * 2 > found.checked and lossless:
        warnings.append(
            warning(
                "jpeg_artefacts",
                f"{role}: {found.jpeg_like} of {found.checked} images that were looked at have the block pattern of"
                " JPEG, though they are stored without loss: they were JPEG once, which FID notices.",
            )
        )
    if protocol.side and images.size != (protocol.side, protocol.side):
        warnings.append(
            warning(
                "wrong_size",
                f"{role}: images are {images.size[0]} x {images.size[1]}, and {protocol.name} is of {protocol.side} x"
                f" {protocol.side}.",
            )
        )
    if found.duplicates:
        warnings.append(
            warning(
                "duplicates", f"{role}: {found.duplicates} of {found.count} images are copies of others to the bit."
            )
        )
    return warnings


def of_scores(
    names: Sequence[str],
    found: Collected,
    reference: Collected | Statistics | None,
    protocol: Protocol,
    sizes: Mapping[str, tuple[int, int]],
) -> list[Note]:
    """What is odd about a comparison; `sizes` has those of "images" and, where it is one of images, "reference"."""
    warnings = []
    if set(names) & set(_FRECHET) and found.count < FEW:
        warnings.append(
            warning(
                "few_samples",
                f"FID of {found.count} images: below {FEW:,} it is mostly bias; compare only with scores of as many, or"
                " use KID.",
            )
        )
    parts = protocol.inception.of(found.count)
    if "is" in names and found.count < 2 * parts:
        warnings.append(
            warning(
                "small_splits",
                f"IS of {found.count} images in {parts} splits: a split of one image scores 1; give --is_splits=1.",
            )
        )
    if protocol.count and found.count != protocol.count:
        warnings.append(
            warning(
                "wrong_count",
                f"{found.count} images, and published scores of {protocol.name} are of {protocol.count:,}.",
            )
        )
    if len(set(sizes.values())) > 1:
        (a, b) = (sizes["images"], sizes["reference"])
        warnings.append(
            warning(
                "unequal_sizes",
                f"images are {a[0]} x {a[1]} and reference images {b[0]} x {b[1]}: each is resized on its own.",
            )
        )
    if isinstance(reference, Collected) and (common := len(set(found.keys()) & set(reference.keys()))):
        warnings.append(warning("overlap", f"{common} images are in the reference too, to the bit."))
    if isinstance(reference, Statistics) and reference.about.get("protocol", protocol.name) != protocol.name:
        warnings.append(
            warning(
                "other_protocol",
                f"the reference's statistics were made by {reference.about['protocol']}, not by {protocol.name}.",
            )
        )
    return warnings


def of_training(reference: Collected, training: Collection[bytes]) -> list[Note]:
    """Whether training images are in the reference."""
    common = sum(key in training for key in reference.keys())  # noqa: SIM118 - not a mapping
    if not common:
        return []
    return [
        warning(
            "train_images",
            f"{common} of {reference.count} reference images were trained on: the score measures memory as well.",
        )
    ]


def lines(warnings: Sequence[Mapping[str, Any]]) -> str:
    """The warnings for a terminal."""
    return "\n".join(f"warning ({w['name']}): {w['text']}" for w in warnings)
