"""Protocols: named, complete descriptions of how scores are computed, so that equal names mean comparable numbers.

A protocol fixes the network and its resizing, the reference, how many images of which size and format, how KID and the
Inception Score draw, and for generated images the captions and the sampler. Nothing here starts JAX.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from imagegpt_jax.config import choose
from imagegpt_jax.metrics.kernels import Subsets
from imagegpt_jax.metrics.resizing import Crop
from imagegpt_jax.metrics.statistics import splits_by_number


@dataclasses.dataclass(frozen=True)
class InceptionSplits:
    """How the Inception Score cuts its images: into `count` equal parts, or, if that is 0, parts of `size` images."""

    count: int = 10
    size: int = 0
    shuffle_seed: int | None = None  # of `RandomState`, by which images are shuffled before; None keeps their order

    def of(self, images: int) -> int:
        """How many parts so many images make."""
        return self.count or max(1, -(-images // self.size))

    def split(self, images: int) -> Int[np.ndarray, "N"]:
        """The part of each of so many images."""
        if self.count:
            return splits_by_number(images, self.count, self.shuffle_seed)
        return np.arange(images) // self.size


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How scores are computed."""

    name: str
    about: str  # where it is from, in a sentence
    metrics: tuple[str, ...]  # what is computed unless --metrics says otherwise
    reference: str  # what to compare with
    features: str = "inception"  # network of FID, KID, precision and the like
    resize: str = "tf1_bilinear"  # how images come to the network's size, see `resizing`
    count: int = 0  # images that published scores are of; 0 if any number
    side: int = 0  # pixels of a side of the images; 0 if any
    lossless: bool = True  # whether the images have to be stored without loss
    kid: Subsets = dataclasses.field(default_factory=Subsets)
    inception: InceptionSplits = dataclasses.field(default_factory=InceptionSplits)
    neighbours: int = 3  # of precision and recall
    captions: str = ""  # which captions images are generated for
    prefix: str = ""  # what stands before captions where CLIP compares them with images
    each: int = 1  # images of each caption
    # How photographs come to `side` where they differ in size or are larger, see `resizing`; "": they must be alike.
    reference_crop: str = ""
    image_crop: str = ""
    sampler: str = "the sampler that the images' metadata names"

    def crop(self, name: str) -> Crop | None:
        """The crop of this name to `side`; None for ""."""
        return Crop(name, self.side) if name else None

    def facts(self) -> dict[str, Any]:
        """Everything that two scores must have in common to be compared."""
        return dataclasses.asdict(self)

    def with_subsets(self, count: int | None, size: int | None) -> "Protocol":
        """The protocol with other numbers for KID, where they are given."""
        kid = dataclasses.replace(self.kid, count=count or self.kid.count, size=size or self.kid.size)
        return dataclasses.replace(self, kid=kid)

    def with_splits(self, count: int | None) -> "Protocol":
        """The protocol with another number of splits for the Inception Score, if it is given."""
        splits = self.inception if count is None else dataclasses.replace(self.inception, count=count, size=0)
        return dataclasses.replace(self, inception=splits)


PROTOCOLS: Mapping[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            name="adm_imagenet256",
            about="class-conditional ImageNet 256 as ADM's evaluator scores it (arXiv:2105.05233)",
            metrics=("fid", "sfid", "is", "precision", "recall"),
            reference="ADM's VIRTUAL_imagenet256_labeled.npz: its statistics, and its 10,000 images for precision",
            count=50_000,
            side=256,
            inception=InceptionSplits(count=0, size=5000),
            each=50,
            reference_crop="adm_center_crop",
            sampler="50 images of each of the 1000 classes",
        ),
        Protocol(
            name="clean_fid",
            about="clean-fid's mode `clean` (arXiv:2104.11222)",
            metrics=("fid", "kid"),
            reference="a folder of real images, or its statistics made with this protocol",
            resize="pil_bicubic_float",
            kid=Subsets(seed=0),
        ),
        Protocol(
            name="torch_fidelity",
            about="torch-fidelity's defaults",
            metrics=("fid", "is", "kid"),
            reference="a folder of real images",
            inception=InceptionSplits(count=10, shuffle_seed=2020),
        ),
        Protocol(
            name="coco30k_zero_shot",
            about="zero-shot MS-COCO 2014 (arXiv:2206.10789) as LlamaGen and GigaGAN compute it (arXiv:2406.06525)",
            metrics=("fid", "clip_score"),
            reference="all images of COCO 2014 validation, as they are",
            resize="pil_bicubic_float",
            count=30_000,
            side=256,
            captions="LlamaGen's coco_captions.csv in order, or as many drawn from captions_val2014.json without"
            " replacement, see `prompts.coco_captions`",
            prefix="A photo depicts ",
            reference_crop="pil_lanczos_square",
            image_crop="pil_lanczos_square",
            sampler="one image of each caption",
        ),
        Protocol(
            name="parti_prompts",
            about="the 1632 prompts of PartiPrompts, which have no reference images (arXiv:2206.10789)",
            metrics=("clip_score",),
            reference="none: images are compared with their prompts",
            count=1632,
            captions="PartiPrompts.tsv, all of its rows in order",
            sampler="one image of each prompt",
        ),
        Protocol(
            name="geneval",
            about="compositional prompts judged by an object detector (arXiv:2310.11513)",
            metrics=("geneval",),
            reference="none: a scorer judges each image by its prompt's metadata",
            count=2212,
            captions="evaluation_metadata.jsonl, 553 prompts",
            each=4,
            sampler="four images of each prompt",
        ),
        Protocol(
            name="rfid_imagenet_val",
            about="reconstructions of ImageNet's 50,000 validation images, as tokenizers are compared",
            metrics=("fid", "is", "psnr", "ssim"),
            reference="the validation images themselves, cropped to 256 by adm_center_crop",
            count=50_000,
            side=256,
            inception=InceptionSplits(count=10),
            reference_crop="adm_center_crop",
            sampler="each validation image, encoded and decoded",
        ),
        Protocol(
            name="emoji",
            about="this program's own: no download, small sets",
            metrics=("kid",),
            reference="emoji of concepts that were not trained on",
            features="efficientnet_lite0",
            resize="pil_bicubic_float",
            kid=Subsets(count=100, size=200),
        ),
    )
}


def find(name: str) -> Protocol:
    """The protocol of this name; raises UserError if there is none."""
    return choose("protocol", name, PROTOCOLS)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What two protocols' facts differ in, a phrase each."""
    return [
        f"{name}: {a.get(name)!r} against {b.get(name)!r}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and name != "about"
    ]
