"""Sequences of published decoders of images: one token that begins, then the codes in raster order. NumPy only.

Ids are those of the published weights, whatever their order. What `data/packing.py` is for decoders trained here.

Shapes: B batch, N codes of a picture.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from imagegpt_jax.data.packing import NO_LABEL, SEGMENT
from imagegpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSpace:
    """Ids of a published decoder: its codes are 0 .. num_codes - 1.

    Attributes:
      num_codes: size of the codebook.
      vocab_size: number of ids.
      begin: id of the token before the first code: start of sequence, or "no class".
      num_classes: classes, which may stand in its place.
      class_start: id of class 0.
    """

    num_codes: int
    vocab_size: int
    begin: int = 0
    num_classes: int = 0
    class_start: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RasterLayout:
    """How a published decoder lays out a picture; the part of `packing.Layout` that sampling uses.

    Attributes:
      space: the ids.
      grid: (rows, columns) of codes.
      by_row: whether codes stand at (row, column), else at their place in the sequence.
    """

    space: ImageSpace
    grid: tuple[int, int]
    by_row: bool

    @property
    def num_codes(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def text_length(self) -> int:
        """Tokens of text: none."""
        return 0

    @property
    def image_ids(self) -> tuple[int, int]:
        """(start, size) of the ids of codes."""
        return 0, self.space.num_codes

    def image_offsets(self) -> np.ndarray:
        """int32 [N, 3]: position of each code, less the one right after the first token."""
        index = np.arange(self.num_codes, dtype=np.int32)
        if not self.by_row:
            return np.stack([index] * 3, axis=-1)
        rows, columns = np.divmod(index, np.int32(self.grid[1]))
        return np.stack([np.zeros_like(rows), rows, columns], axis=-1)

    def positions(self, length: int) -> np.ndarray:
        """int32 [length, 3]: positions of a sequence from its first token on; raises UserError beyond a picture."""
        if length > self.num_codes + 1:
            raise UserError(f"a picture of {self.grid[0]} x {self.grid[1]} codes has no {length} tokens.")
        return np.concatenate([np.zeros((1, 3), np.int32), 1 + self.image_offsets()])[:length]

    def prompt(
        self, texts: Sequence[Sequence[int]] | None, labels: Sequence[int] | np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """First tokens and segments, int32 [B, 1], positions [B, 1, 3]; raises UserError for texts, unknown classes."""
        if texts is not None and any(len(text) for text in texts):
            raise UserError("these weights take no prompts in words: give classes, or features of a text encoder.")
        batch = len(texts) if texts is not None else len(labels if labels is not None else ())
        label_B = np.full(batch, NO_LABEL) if labels is None else np.asarray(labels)
        if label_B.size and label_B.max() >= self.space.num_classes and label_B.max() != NO_LABEL:
            raise UserError(f"class {label_B.max()} is not one of the {self.space.num_classes} classes.")
        tokens_B = np.where(label_B == NO_LABEL, self.space.begin, self.space.class_start + label_B)
        return {
            "tokens": tokens_B[:, None].astype(np.int32),
            "positions": np.zeros((batch, 1, 3), np.int32),
            "segments": np.full((batch, 1), SEGMENT, np.int32),
        }
