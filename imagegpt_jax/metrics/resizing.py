"""Resizing as the programs do that scores are compared with; a protocol names which.

Shapes: H W pixels of an image, S of a side of the result.
"""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from imagegpt_jax.config import choose


def in_network(image_HWC: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "H W 3"]:
    """The image as it is: the network resizes it bilinearly, as TensorFlow 1 did (ADM, torch-fidelity)."""
    del size
    return image_HWC


def pil_bicubic_float(image_HWC: UInt8[np.ndarray, "H W 3"], size: int) -> Float[np.ndarray, "S S 3"]:
    """clean-fid's: Pillow's antialiased bicubic filter on each channel in floating point, not rounded to 8 bits."""
    channels = [
        np.asarray(
            Image.fromarray(image_HWC[..., c].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC),
            np.float32,
        )
        for c in range(image_HWC.shape[-1])
    ]
    return np.stack(channels, axis=-1).clip(0, 255)


def pil_bicubic_crop(image_HWC: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """CLIP's and DINOv2's: Pillow's bicubic filter to 8 bits, shorter side to `size`, then the central square."""
    height, width = image_HWC.shape[:2]
    scale = size / min(height, width)
    sides = (max(size, int(width * scale)), max(size, int(height * scale)))
    image = Image.fromarray(image_HWC)
    if image.size != sides:
        image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (sides[0] - size) // 2, (sides[1] - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def adm_center_crop(image_HWC: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """How ADM prepares training and reference images: box filter by halves, bicubic to the shorter side, central crop.

    Dhariwal and Nichol 2021 (arXiv:2105.05233), `center_crop_arr`.
    """
    image = Image.fromarray(image_HWC)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def pil_lanczos_square(image_HWC: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """How GigaGAN's and LlamaGen's programs prepare COCO's images: the central square, then Pillow's Lanczos filter."""
    image, side = Image.fromarray(image_HWC), min(image_HWC.shape[:2])
    left, top = (round((length - side) / 2) for length in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS))


RESIZERS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "tf1_bilinear": in_network,
    "pil_bicubic_float": pil_bicubic_float,
    "pil_bicubic_crop": pil_bicubic_crop,
    "pil_lanczos_square": pil_lanczos_square,
    "adm_center_crop": adm_center_crop,
}


@dataclasses.dataclass(frozen=True)
class Crop:
    """How photographs come to one size: the name of a resizer, and pixels of a side."""

    name: str
    side: int

    def __call__(self, image_HWC: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "S S 3"]:
        """The image at its size."""
        return RESIZERS[self.name](image_HWC, self.side)

    def changes(self, sizes: Collection[tuple[int, int]]) -> bool:
        """Whether a set is cropped: where images differ in size, or are larger. Others count as what they are."""
        return len(sizes) > 1 or any(max(size) > self.side for size in sizes)


def to_size(name: str, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """The resizer of this name, to `size` pixels a side; raises UserError if there is none."""
    resize = choose("resizer", name, RESIZERS)
    return lambda image_HWC: resize(image_HWC, size)
