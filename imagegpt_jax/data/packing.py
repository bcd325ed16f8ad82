"""One token space, and how a picture and its words become one sequence. NumPy only.

    text -> image   [class] text ... <pad> ... <boi> codes (raster order) <eoi>
    image -> text   <boi> codes <eoi> [class] text ... <eot> <pad> ...

The text region of text -> image has a fixed length T and is padded on the right, so every picture starts at the same
index. Positions do not see that padding: with n real tokens, text token i is at (i, i, i), <boi> at (n, n, n), the
code of row r and column c at (n + 1, n + 1 + r, n + 1 + c), and what follows a picture of h x w codes goes on at
n + 1 + max(h, w) on all three axes. Dropping the text (guidance dropout) leaves an empty text region: n = 0.

The codes of text -> image may stand in any other order (random-order training, arXiv:2411.00776): each keeps the
position of its place in the picture, and `target_positions` says which place comes next.

Shapes: B batch, T text region, N codes of a picture, L length.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from imagegpt_jax.errors import UserError

TEXT_TO_IMAGE, IMAGE_TO_TEXT = 0, 1
# Kinds of target, and of loss: none (structure and padding), text, image.
NONE, TEXT, IMAGE = 0, 1, 2
PADDING_SEGMENT, SEGMENT = 0, 1
NO_LABEL = -1
_SPECIALS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSpace:
    """The one vocabulary: `[text ids][pad, boi, eoi, eot][class ids][image codes]`.

    Attributes:
      text_vocab: number of text ids (0 for none).
      num_classes: number of classes (0 for none).
      num_codes: size of the codebook.
    """

    text_vocab: int
    num_classes: int
    num_codes: int

    def __post_init__(self):
        if min(self.text_vocab, self.num_classes) < 0 or self.num_codes < 1:
            raise UserError(
                f"token space: text_vocab={self.text_vocab} and num_classes={self.num_classes} must be at least 0, and"
                f" num_codes={self.num_codes} at least 1."
            )

    @property
    def pad(self) -> int:
        """Id of padding; also the condition "none" of adaptive norms."""
        return self.text_vocab

    @property
    def boi(self) -> int:
        """Begin of image."""
        return self.text_vocab + 1

    @property
    def eoi(self) -> int:
        """End of image."""
        return self.text_vocab + 2

    @property
    def eot(self) -> int:
        """End of text, after a caption."""
        return self.text_vocab + 3

    @property
    def class_start(self) -> int:
        """Id of class 0."""
        return self.text_vocab + _SPECIALS

    @property
    def image_start(self) -> int:
        """Id of image code 0; every id below it is text, special or class."""
        return self.class_start + self.num_classes

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.image_start + self.num_codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How examples become sequences of one length.

    Attributes:
      space: the vocabulary.
      text_length: T, tokens of the text region (class and text); longer captions are cut.
      grid: (rows, columns) of codes of a picture.
      text_weight: loss weight of text targets.
      image_weight: loss weight of image targets.
      target_positions: also tell where the token stands that each token predicts (`GPTConfig.target_positions`).
    """

    space: TokenSpace
    text_length: int
    grid: tuple[int, int]
    text_weight: float = 1.0
    image_weight: float = 1.0
    target_positions: bool = False

    def __post_init__(self):
        if self.text_length < 0 or len(self.grid) != 2 or min(self.grid) < 1:
            raise UserError(f"layout: text_length={self.text_length} or grid={self.grid} is not possible.")
        if self.text_length < 1 and (self.space.text_vocab or self.space.num_classes):
            raise UserError("layout: a token space with text or classes needs text_length >= 1.")
        if min(self.text_weight, self.image_weight) < 0 or self.text_weight + self.image_weight == 0:
            raise UserError("layout: text_weight and image_weight must be at least 0, and one of them positive.")

    @property
    def num_codes(self) -> int:
        """N, codes of one picture."""
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """L: tokens of a packed sequence (the input; its last target is <eot> of a caption)."""
        return self.text_length + self.num_codes + 2

    @property
    def prompt_length(self) -> int:
        """Tokens of a sampling prompt: the text region and <boi>."""
        return self.text_length + 1

    @property
    def max_position(self) -> int:
        """The largest position of any token: learned position tables need more rows than this."""
        return self.text_length + 1 + max(self.grid)

    @property
    def text_ids(self) -> tuple[int, int]:
        """(start, size) of the ids that a text target can be: everything below the image codes."""
        return 0, self.space.image_start

    @property
    def image_ids(self) -> tuple[int, int]:
        """(start, size) of the ids that an image target can be."""
        return self.space.image_start, self.space.num_codes

    def image_offsets(self) -> np.ndarray:
        """int32 [N, 3]: position of each code, less the position right after <boi>."""
        rows, columns = np.divmod(np.arange(self.num_codes, dtype=np.int32), np.int32(self.grid[1]))
        return np.stack([np.zeros_like(rows), rows, columns], axis=-1)

    # ---------------------------------------------------------------------------------------------------- packing

    def pack(
        self,
        texts: Sequence[Sequence[int]] | None,
        labels: Sequence[int] | np.ndarray | None,
        codes_BN: np.ndarray,
        directions_B: Sequence[int] | np.ndarray | None = None,
        drops_B: Sequence[bool] | np.ndarray | None = None,
        orders_BN: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Packs examples for training.

        Args:
          texts: token ids of each caption; `None` or empty lists for none.
          labels: class of each example, NO_LABEL (-1) or `None` for none. The class token comes before the text.
          codes_BN: image codes, [B, N] or [B, rows, columns].
          directions_B: TEXT_TO_IMAGE (default) or IMAGE_TO_TEXT.
          drops_B: where True the text region is left empty (guidance dropout); for text -> image only.
          orders_BN: the place in raster order of the first code, the second, ...; raster order by default. For text ->
            image only, and with `target_positions`: nothing else tells which code is to come.

        Returns:
          tokens, targets, segments: int32 [B, L]; positions: int32 [B, L, 3]; weights: float32 [B, L]; kind: int8
          [B, L], the kind of each *target*; condition: int32 [B], the class token, or padding (for adaptive norms);
          with `target_positions` also those, int32 [B, L, 3].

        Raises:
          UserError: if codes do not fit the grid, or ids the token space; for orders without `target_positions`.
        """
        if orders_BN is not None and not self.target_positions:
            raise UserError("codes in any order need target_positions: nothing else tells which one comes next.")
        codes_BN = self._check_codes(np.asarray(codes_BN))
        batch = len(codes_BN)
        directions = np.full(batch, TEXT_TO_IMAGE) if directions_B is None else np.asarray(directions_B)
        drops = np.zeros(batch, bool) if drops_B is None else np.asarray(drops_B, bool)
        prefixes = self._prefixes(texts, labels, drops & (directions == TEXT_TO_IMAGE))

        out = self._empty(batch, self.length)
        out["targets"] = np.full_like(out["tokens"], self.space.pad)
        out["kind"] = np.full(out["tokens"].shape, NONE, np.int8)
        image_ids = codes_BN + self.space.image_start
        first, count, side = self.text_length, self.num_codes, max(self.grid)
        offsets_N3, raster_N = self.image_offsets(), np.arange(count)
        for b, prefix in enumerate(prefixes):
            row = {k: v[b] for k, v in out.items() if k != "condition"}
            if directions[b] == TEXT_TO_IMAGE:
                self._put_prefix(out, b, prefix)
                order_N = raster_N if orders_BN is None else orders_BN[b]
                row["tokens"][first + 1 :] = [*image_ids[b][order_N], self.space.eoi]
                row["segments"][first + 1 :] = SEGMENT
                row["positions"][first + 1 : -1] = len(prefix) + 1 + offsets_N3[order_N]
                row["positions"][-1] = len(prefix) + 1 + side
                row["targets"][first : first + count + 1] = row["tokens"][first + 1 :]
                row["kind"][first : first + count] = IMAGE
                if len(prefix):
                    row["targets"][: len(prefix)] = [*prefix[1:], self.space.boi]
                    row["kind"][: len(prefix)] = TEXT
                    if len(prefix) == 1 and prefix[0] >= self.space.class_start:
                        row["kind"][0] = NONE  # after a class alone <boi> is certain
            else:
                end = count + 2 + len(prefix)
                row["tokens"][:end] = [self.space.boi, *image_ids[b], self.space.eoi, *prefix]
                row["segments"][:end] = SEGMENT
                row["positions"][1 : count + 1] = 1 + offsets_N3
                row["positions"][count + 1 : end] = 1 + side + np.arange(end - count - 1)[:, None]
                row["targets"][:end] = [*row["tokens"][1:end], self.space.eot]
                row["kind"][:count] = IMAGE
                row["kind"][count + 1 : end] = TEXT
        table = np.array([0.0, self.text_weight, self.image_weight], np.float32)
        out["weights"] = table[out["kind"]]
        return self._with_target_positions(out)

    def prompt(
        self,
        texts: Sequence[Sequence[int]] | None,
        labels: Sequence[int] | np.ndarray | None = None,
        drops_B: Sequence[bool] | np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The left part of `pack` for text -> image, up to <boi>: tokens, segments [B, T + 1], positions, condition.

        Raises:
          UserError: if neither texts nor labels are given, or ids do not fit the token space.
        """
        if texts is None and labels is None:
            raise UserError("a prompt needs texts or labels (an empty text for an unconditional picture).")
        batch = len(texts) if texts is not None else len(labels)  # type: ignore[arg-type]
        drops = np.zeros(batch, bool) if drops_B is None else np.asarray(drops_B, bool)
        out = self._empty(batch, self.prompt_length)
        for b, prefix in enumerate(self._prefixes(texts, labels, drops)):
            self._put_prefix(out, b, prefix)
        return self._with_target_positions(out)

    def caption_prompt(self, codes_BN: np.ndarray) -> dict[str, np.ndarray]:
        """The left part of `pack` for image -> text, up to <eoi>: tokens, segments [B, N + 2], positions, condition."""
        codes_BN = self._check_codes(np.asarray(codes_BN))
        out = self._empty(codes_BN.shape[0], self.num_codes + 2)
        out["tokens"][:, 0] = self.space.boi
        out["tokens"][:, 1:-1] = codes_BN + self.space.image_start
        out["tokens"][:, -1] = self.space.eoi
        out["segments"][:] = SEGMENT
        out["positions"][:, 1:-1] = 1 + self.image_offsets()
        out["positions"][:, -1] = 1 + max(self.grid)
        return self._with_target_positions(out)

    # ------------------------------------------------------------------------------------------------------- parts

    def _empty(self, batch: int, length: int) -> dict[str, np.ndarray]:
        """All padding."""
        return {
            "tokens": np.full((batch, length), self.space.pad, np.int32),
            "positions": np.zeros((batch, length, 3), np.int32),
            "segments": np.full((batch, length), PADDING_SEGMENT, np.int32),
            "condition": np.full((batch,), self.space.pad, np.int32),
        }

    def _with_target_positions(self, out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds, if wanted, the position of the next real token of each row; after the last it goes on by one."""
        if self.target_positions:
            out["target_positions"] = np.zeros_like(out["positions"])
            for b, segments in enumerate(out["segments"]):
                (real,) = np.nonzero(segments)
                positions = out["positions"][b, real]
                out["target_positions"][b, real] = np.concatenate([positions[1:], positions[-1:] + 1])
        return out

    def _put_prefix(self, out: dict[str, np.ndarray], b: int, prefix: np.ndarray) -> None:
        """Writes class, text and <boi> into row `b` of text -> image."""
        n = len(prefix)
        region = [*range(n), self.text_length]
        out["tokens"][b, region] = [*prefix, self.space.boi]
        out["positions"][b, region] = np.arange(n + 1)[:, None]
        out["segments"][b, region] = SEGMENT
        if n and prefix[0] >= self.space.class_start:
            out["condition"][b] = prefix[0]

    def _prefixes(
        self, texts: Sequence[Sequence[int]] | None, labels: Sequence[int] | np.ndarray | None, drops_B: np.ndarray
    ) -> list[np.ndarray]:
        """Class and text tokens of each row, cut to the text region and checked; none where they are dropped."""
        batch = len(drops_B)
        for name, values in (("texts", texts), ("labels", labels)):
            if values is not None and len(values) != batch:
                raise UserError(f"packing got {len(values)} {name} for a batch of {batch}.")
        prefixes = []
        for b in range(batch):
            text = np.asarray([] if texts is None else texts[b], np.int32)[: self.text_length]
            if text.size and (text.min() < 0 or text.max() >= self.space.text_vocab):
                raise UserError(
                    f"text id {text.max()} is outside the token space's {self.space.text_vocab} text ids: was the text"
                    " encoded with another tokenizer?"
                )
            label = NO_LABEL if labels is None else int(labels[b])
            if label != NO_LABEL:
                if not 0 <= label < self.space.num_classes:
                    raise UserError(f"class {label} is not one of the token space's {self.space.num_classes} classes.")
                text = np.concatenate([np.array([self.space.class_start + label], np.int32), text])[: self.text_length]
            prefixes.append(text[:0] if drops_B[b] else text)
        return prefixes

    def _check_codes(self, codes_BN: np.ndarray) -> np.ndarray:
        if codes_BN.shape[1:] not in (self.grid, (self.num_codes,)):
            raise UserError(f"codes of shape {codes_BN.shape[1:]} do not fit the layout's grid {self.grid}.")
        codes_BN = codes_BN.reshape(codes_BN.shape[0], -1).astype(np.int32)
        if codes_BN.size and (codes_BN.min() < 0 or codes_BN.max() >= self.space.num_codes):
            raise UserError(f"image codes up to {codes_BN.max()} do not fit a codebook of {self.space.num_codes}.")
        return codes_BN
