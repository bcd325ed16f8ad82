"""What is in the built-in set, and which split each picture belongs to.

The files beside this one are made by tools/build_emoji.py, which says what is kept and what is not.
"""

import dataclasses
import functools
import hashlib
import json
import lzma
import re
from pathlib import Path

STYLES = ("noto", "twemoji", "fluent")
SPLITS = ("train", "validation", "heldout_style", "all")

VALIDATION_SHARE = 0.05  # of all concepts
HELDOUT_STYLE_SHARE = 0.03  # of the concepts that every style has and that are not in validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawing of one concept.

    Attributes:
      style: the set it is from, one of STYLES.
      concept: id that all drawings of this concept share, such as "red-heart".
      name: the concept in words, such as "red heart"; no two concepts share one.
      codepoints: Unicode sequence in hexadecimal, without variation selectors.
      category: index into `categories()`.
      keywords: English words that go with the concept; may be empty.
      slug: the icon's name in its own set, which need not be `concept`.
      width, height: of the SVG's view box.
      row: position in the style's drawings, see `drawings`.
    """

    style: str
    concept: str
    name: str
    codepoints: str
    category: int
    keywords: tuple[str, ...]
    slug: str
    width: float
    height: float
    row: int

    @property
    def id(self) -> str:
        """Style and concept, unique in the set."""
        return f"{self.style}/{self.concept}"


def _read(name: str) -> str:
    return lzma.decompress(Path(__file__).with_name(name).read_bytes()).decode()


@functools.cache
def _index() -> dict:
    return json.loads(_read("index.json.xz"))


def categories() -> tuple[str, ...]:
    """Returns the names of Unicode's emoji groups, the set's class labels."""
    return tuple(_index()["categories"])


@functools.cache
def pictures() -> tuple[Picture, ...]:
    """Returns the whole set, ordered by concept, then style."""
    index = _index()
    chosen = []
    for style in STYLES:
        for row, (concept, slug, width, height) in enumerate(index["pictures"][style]["rows"]):
            concept_id, name, codepoints, category, keywords = index["concepts"][concept]
            picture = Picture(
                style=style,
                concept=concept_id,
                name=name,
                codepoints=codepoints,
                category=category,
                keywords=tuple(keywords),
                slug=slug,
                width=width,
                height=height,
                row=row,
            )
            chosen.append((concept, STYLES.index(style), picture))
    return tuple(p for _, _, p in sorted(chosen, key=lambda f: f[:2]))


def drawings(style: str) -> list[str]:
    """Returns the inside of the SVG element of every picture of a style; takes about 0.1 s."""
    return _read(f"{style}.svg.xz").split("\n")


def drawings_sha256(style: str) -> str:
    """Returns the checksum of a style's drawings, without reading them."""
    return _index()["pictures"][style]["sha256"]


# ---------------------------------------------------------------------------------------------------------- splits

# Gender signs, the right-facing arrow and the joiner before them only vary a concept.
_VARIANT_SIGNS = re.compile(r"-200d-(2640|2642|27a1)\b")
_PERSON = re.compile(r"\b(1f468|1f469)\b")


def split_group(codepoints: str) -> str:
    """Returns the Unicode sequence without gender and direction.

    A woman, a man and a person with the same job, or walking the other way, are drawn almost alike. They are different
    concepts, but with one of them in train and another in validation, validation would measure memory.
    """
    return _PERSON.sub("1f9d1", _VARIANT_SIGNS.sub("", codepoints))


def _draw(purpose: str, group: str) -> int:
    return int.from_bytes(hashlib.sha256(f"imagegpt_jax emoji {purpose} {group}".encode()).digest()[:8], "big")


@functools.cache
def _concepts_in_every_style() -> frozenset[str]:
    styles: dict[str, set[str]] = {}
    for p in pictures():
        styles.setdefault(p.concept, set()).add(p.style)
    return frozenset(c for c, have in styles.items() if len(have) == len(STYLES))


def split_of(picture: Picture) -> str:
    """Returns "train", "validation" or "heldout_style".

    The first two hold all styles of a concept. "heldout_style" holds one style (hashed too) of concepts whose other
    styles are in train: it asks for a known thing in a style it was never shown in. It depends on hashes of the
    concept alone, so a picture keeps its split when others are added to the set.
    """
    group = split_group(picture.codepoints)
    if _draw("validation", group) < VALIDATION_SHARE * 2**64:
        return "validation"
    chosen = _draw("heldout", group) < HELDOUT_STYLE_SHARE * 2**64 and picture.concept in _concepts_in_every_style()
    if chosen and picture.style == STYLES[_draw("style", group) % len(STYLES)]:
        return "heldout_style"
    return "train"
