"""The built-in set as a data source: random access to records, see imagegpt_jax/data/sources.py."""

import collections
import hashlib
import itertools
import threading
from collections.abc import Sequence
from typing import Any

from imagegpt_jax.data.emoji import catalog, render
from imagegpt_jax.errors import UserError, suggest

CAPTIONS = ("name", "keywords")
MAX_RES = 2048


class EmojiSource:
    """Emoji in up to three styles with names, categories and concept ids.

    A record is {"id": "noto/red-heart", "image": PNG bytes (RGB, res x res, on white), "captions": list[str],
    "label": int (category, see `label_names`), "concept": "red-heart", "style": "noto"}.

    Attributes:
      name: the spec that opens it.
      label_names: the categories, in the order of the labels.
      fingerprint: changes when ids, captions, labels or pixels may have changed.
      pictures: what each record is made from, in the order of the records.
    """

    def __init__(
        self,
        split: str = "train",
        res: int = 32,
        styles: Sequence[str] = catalog.STYLES,
        captions: str = "name",
    ):
        """Opens a split; the pictures are drawn when the first record is asked for.

        Args:
          split: "train", "validation" (concepts that no other split has), "heldout_style" (concepts of train, in one
            style that train lacks) or "all".
          res: side of the pictures in pixels.
          styles: which of the sets to include.
          captions: "name" gives one caption, "noto emoji of red heart"; "keywords" adds a second one made of the
            keywords of the concept, if it has any.

        Raises:
          UserError: when an argument is none of these.
        """
        if isinstance(styles, str):
            styles = (styles,)
        for what, value, known in [
            ("split", split, catalog.SPLITS),
            ("captions", captions, CAPTIONS),
            *(("style", style, catalog.STYLES) for style in styles),
        ]:
            if value not in known:
                raise UserError(f"the built-in emoji set has no {what} {value!r}.{suggest(value, known)}")
        if not styles:
            raise UserError(
                f"no style of the built-in emoji set was asked for: name some of {', '.join(catalog.STYLES)}."
            )
        if not 1 <= res <= MAX_RES:
            raise UserError(f"emoji cannot be drawn at res={res}: choose 1 to {MAX_RES} pixels.")
        self.res = res
        self.captions = captions
        self.pictures = tuple(
            p for p in catalog.pictures() if p.style in styles and split in ("all", catalog.split_of(p))
        )
        chosen = [s for s in catalog.STYLES if s in styles]
        self.name = f"emoji:{split},res={res}"
        if len(chosen) < len(catalog.STYLES):
            self.name += f",styles={'+'.join(chosen)}"
        if captions != "name":
            self.name += f",captions={captions}"
        self.label_names = catalog.categories()
        self._archives: dict[str, render.Archive] = {}
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that decides the records."""
        digest = hashlib.sha256(f"{self.res} {render.renderer_version()} {self.label_names}\n".encode())
        for style in sorted({p.style for p in self.pictures}):
            digest.update(f"{style} {catalog.drawings_sha256(style)}\n".encode())
        for p in self.pictures:
            digest.update(f"{p.id} {p.category} {self._captions(p)}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the records at these positions."""
        return [self._record(self.pictures[i]) for i in indices]

    def pairs(self) -> list[tuple[int, int]]:
        """Returns (i, j) for every two records of one concept in different styles, in both orders.

        With `split="heldout_style"`, which has one style of each concept, there are none: open "all".
        """
        records = collections.defaultdict(list)
        for i, p in enumerate(self.pictures):
            records[p.concept].append(i)
        return [pair for same in records.values() for pair in itertools.permutations(same, 2)]

    def _captions(self, p: catalog.Picture) -> list[str]:
        captions = [f"{p.style} emoji of {p.name}"]
        if self.captions == "keywords" and p.keywords:
            captions.append(f"{p.style} emoji of {', '.join(p.keywords)}")
        return captions

    def _record(self, p: catalog.Picture) -> dict[str, Any]:
        return {
            "id": p.id,
            "image": self._archive(p.style)[p.row],
            "captions": self._captions(p),
            "label": p.category,
            "concept": p.concept,
            "style": p.style,
        }

    def _archive(self, style: str) -> render.Archive:
        with self._lock:
            if style not in self._archives:
                self._archives[style] = render.open_archive(style, self.res)
            return self._archives[style]
