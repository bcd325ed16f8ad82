"""Images that are in no file as image sets: a data source, what a tokenizer makes of it, and drawn samples.

Shapes: B batch, H W C image.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagegpt_jax import images
from imagegpt_jax.data import pipeline
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import loading

_BATCH_SIZE = 32


class Held:
    """Images in memory."""

    in_order = False

    def __init__(self, name: str, images_NHWC: UInt8[np.ndarray, "N H W 3"], names: Sequence[str] = ()):
        """Holds images, called `names`, or by their numbers."""
        self.path, self._images = name, images_NHWC
        self.size = (images_NHWC.shape[1], images_NHWC.shape[2])
        self.formats = {"decoded": len(images_NHWC)}
        self.names = list(names) or [str(i) for i in range(len(images_NHWC))]

    @property
    def shape(self) -> tuple[int, ...]:
        """[H, W, 3]."""
        return self._images.shape[1:]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """One image."""
        return self._images[number]


class Decoded:
    """Images of a data source after its operations, in order; through a tokenizer and back if there is one."""

    in_order = True

    def __init__(self, name: str, source: Any, ops: str, tokenizer: loading.Tokenizer | None = None):
        """Reads the first image to learn the size.

        Args:
          name: what the set is called.
          source: a data source with images.
          ops: what is done to them; the same size for all.
          tokenizer: what encodes and decodes them; None leaves them as they are.

        Raises:
          UserError: if the images are not RGB.
        """
        self.path, self._source, self._ops, self._tokenizer = name, source, ops, tokenizer
        self._stream, self._next = self._images(), 0
        first = next(self._stream)
        self._stream = self._images()
        if first.shape[-1] != 3:
            raise UserError(f"FID and the like are of RGB images, and those of {name} have {first.shape[-1]} channels.")
        self.size = (first.shape[0], first.shape[1])
        self.formats = {"decoded": len(source)}

    def _images(self) -> Iterator[np.ndarray]:
        batches = pipeline.Batches(
            self._source, ops=self._ops, batch_size=_BATCH_SIZE, shuffle=False, epochs=1, columns=("image",)
        )
        try:
            for batch in batches:
                found = batch["image"][batch["mask"]] if "mask" in batch else batch["image"]
                if self._tokenizer is not None:
                    codes = self._tokenizer.encode(found)
                    grid = tuple(side // self._tokenizer.downsample for side in found.shape[1:3])
                    found = self._tokenizer.decode(codes, (grid[0], grid[1]))
                yield from images.to_uint8(found)
        finally:
            batches.close()

    @property
    def names(self) -> list[str]:
        """Numbers."""
        return [str(i) for i in range(len(self))]

    @property
    def shape(self) -> tuple[int, ...]:
        """[H, W, 3]."""
        return (*self.size, 3)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """One image; going back starts at the beginning again."""
        if number < self._next:
            self._stream, self._next = self._images(), 0
        while True:
            found = next(self._stream)
            self._next += 1
            if self._next == number + 1:
                return found
