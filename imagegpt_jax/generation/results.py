"""What comes of a request: images with their codes, seeds and metadata, shown as a grid by Jupyter.

Shapes: b images, H W C image, N codes of an image.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from imagegpt_jax import images as images_lib
from imagegpt_jax.generation.prompts import title
from imagegpt_jax.generation.request import GenerationRequest


@dataclasses.dataclass(frozen=True, repr=False)
class GeneratedImages:
    """Images of a request, in order.

    Attributes:
      request: all that they depend on, but for the networks.
      numbers: int [b], place of each image among all of the request.
      sample_indices: int [b], the i of (seed, i) of each image.
      pixels: uint8 [b, H, W, C].
      codes: int32 [b, N].
      log_likelihood: float32 [b], of the codes, in nats, under the guided logits.
      results: of each image, what scorers and safety checks say of it.
      made_by: decoder and tokenizer, see `Pipeline.about`.
    """

    request: GenerationRequest
    numbers: np.ndarray
    sample_indices: np.ndarray
    pixels: np.ndarray
    codes: np.ndarray
    log_likelihood: np.ndarray
    results: Sequence[Mapping[str, Any]]
    made_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def join(cls, parts: Sequence["GeneratedImages"]) -> "GeneratedImages":
        """All images of several parts."""
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return dataclasses.replace(parts[0], **arrays, results=[result for part in parts for result in part.results])

    def take(self, rows: Sequence[int] | np.ndarray) -> "GeneratedImages":
        """Some of the images."""
        arrays = {name: getattr(self, name)[rows] for name in _ARRAYS}
        return dataclasses.replace(self, **arrays, results=[self.results[row] for row in rows])

    @property
    def images(self) -> list[Image.Image]:
        """The images for Pillow."""
        return [images_lib.to_pil(pixels) for pixels in self.pixels]

    @property
    def seeds(self) -> list[tuple[int, int]]:
        """(seed, i) of each image, on which all its random numbers depend."""
        return [(self.request.seed, int(i)) for i in self.sample_indices]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """What a PNG of each image carries: the request of it alone, what checks say, and which networks made it."""
        entries = self.numbers // self.request.num_images
        return [
            {"request": self.request.single(int(entry), int(i)).to_json(), **self.made_by, "results": dict(result)}
            for entry, i, result in zip(entries, self.sample_indices, self.results, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.pixels.shape[1:3]))
        return f"GeneratedImages({len(self)} of {size} pixels, mode={self.request.mode!r}, seed={self.request.seed})"

    def _repr_png_(self) -> bytes:
        texts, labels = self.request.entries
        tiles: dict[int, list[np.ndarray]] = {}
        for entry, pixels in zip(self.numbers // self.request.num_images, self.pixels, strict=True):
            tiles.setdefault(int(entry), []).append(pixels)
        grid = images_lib.grid([images_lib.Tile(title(texts[e], labels[e]), rows) for e, rows in tiles.items()])
        return images_lib.png_bytes(grid, {})


_ARRAYS = ("numbers", "sample_indices", "pixels", "codes", "log_likelihood")
