"""Two sets of images as one set of pairs, for the metrics that compare image with image. Nothing here starts JAX.

Shapes: H W pixels.
"""

import numpy as np

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics.sets import Folder, ImageSet


class Pairs:
    """Two sets as one: image i of the one beside image i of the other, uint8 [2, H, W, 3]."""

    def __init__(self, images: ImageSet, references: ImageSet):
        """Pairs the sets; raises UserError if they differ in number, in size, or in the names of their files."""
        if len(images) != len(references):
            raise UserError(
                f"{images.path} has {len(images)} images and {references.path} has {len(references)}: PSNR, SSIM"
                " and LPIPS compare them in pairs."
            )
        if images.size != references.size:
            raise UserError(
                f"images of {images.path} are {images.size[0]} x {images.size[1]} and those of {references.path}"
                f" {references.size[0]} x {references.size[1]}: PSNR, SSIM and LPIPS compare equal sizes."
            )
        if isinstance(images, Folder) and isinstance(references, Folder):
            for a, b in zip(images.names, references.names, strict=True):
                if a.rpartition(".")[0] != b.rpartition(".")[0]:
                    raise UserError(
                        f"{images.path} and {references.path} do not hold the same names, {a} would be compared with"
                        f" {b}: PSNR, SSIM and LPIPS compare files of the same name."
                    )
        self._sets = (images, references)
        self.path, self.size, self.formats, self.names = images.path, images.size, images.formats, images.names
        self.in_order = images.in_order or references.in_order
        self.shape = (2, *self.size, 3)

    def __len__(self) -> int:
        return len(self._sets[0])

    def read(self, number: int) -> np.ndarray:
        """One pair."""
        return np.stack([part.read(number) for part in self._sets])
