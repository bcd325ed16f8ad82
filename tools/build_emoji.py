"""Builds the built-in picture set, imagegpt_jax/data/emoji/*.xz, from four npm packages.

Get the packages with npm, which leaves four .tgz files in the current folder, and name that folder:

    npm pack @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5
    npm pack @iconify-json/fluent-emoji-flat@1.2.6 emojibase-data@17.0.0
    python tools/build_emoji.py --packages=.

The files must have the SHA-256 sums written below, so the same set is built everywhere; the output is the same byte
for byte with the same liblzma.

What is kept: every icon that its set lists under a Unicode sequence, except
  * skin-tone variants (a code point U+1F3FB to U+1F3FF in the sequence);
  * icons marked hidden: the sets keep them only for users of older names, and they redraw a concept that is present;
  * within a style, pictures equal to another one (Twemoji draws ten kinds of family alike): the shortest name stays.
Pictures of one Unicode sequence are one concept, whatever its three sets call it, so that train and validation never
share one. That gives 5,185 pictures of 1,942 concepts. With the hidden icons it would be about 5,400 under 2,100 names,
some of them two names and two drawings of one thing in one style.

What is written: `index.json.xz` (concepts, names, categories, keywords, rows) and one `STYLE.svg.xz` per style, with
the inside of one SVG element per line, in the order of the rows.
"""

import collections
import dataclasses
import hashlib
import io
import json
import lzma
import re
import tarfile
from pathlib import Path
from typing import Any

from absl import flags

from imagegpt_jax import cli, errors

PACKAGES = flags.DEFINE_string("packages", ".", "Folder with the four .tgz files that `npm pack` made.")
OUTPUT = flags.DEFINE_string(
    "output",
    str(Path(__file__).parents[1] / "imagegpt_jax" / "data" / "emoji"),
    "Folder to write the built set into; the default is its place in the package.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """An npm package at a fixed version; `sha256` is that of the file `npm pack` makes."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The name `npm pack` gives the file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


# In order of preference: a concept takes its id and category from the first style that has it.
STYLES = {
    "noto": Package(
        name="@iconify-json/noto",
        version="1.2.9",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "twemoji": Package(
        name="@iconify-json/twemoji",
        version="1.2.5",
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "fluent": Package(
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
}
NAMES = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
CATEGORIES = (  # Unicode's emoji groups, in Unicode's order, less "Component"
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
_SKIN_TONE = re.compile(r"1f3f[b-f]")
# Paths are long runs of digits, where literals predict each other well and byte alignment means nothing: lc=4, pb=0.
_XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


def read_members(path: Path, package: Package, members: tuple[str, ...]) -> list[Any]:
    """Returns the named JSON files of a package.

    Raises:
      UserError: when the file is missing or is not the one whose checksum is known.
    """
    want = f"{package.name}@{package.version}"
    if not path.is_file():
        raise errors.UserError(f"{path} was not found: make it with `npm pack {want}` in {path.parent}.")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != package.sha256:
        raise errors.UserError(f"{path} is not {want} as published (its SHA-256 differs): run `npm pack {want}` again.")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = [tar.extractfile(f"package/{m}") for m in members]
        return [json.load(f) for f in files if f is not None]


def sequence(codepoints: str) -> str:
    """Returns a Unicode sequence as lower-case hexadecimal without the variation selector, which sets use unevenly."""
    return re.sub(r"-fe0f\b", "", codepoints.lower())


def plain_name(label: str) -> str:
    """Returns a CLDR label as words: "flag: Bosnia & Herzegovina" becomes "flag of Bosnia and Herzegovina"."""
    label = label.replace("flag: ", "flag of ").replace("&", "and").replace("’", "'")
    label = label.replace("keycap: #", "keycap hash").replace("keycap: *", "keycap asterisk")
    return " ".join(re.sub(r"[:“”()!]", " ", label).split())


def unique_icons(icons: dict[str, Any], metadata: dict[str, Any], chars: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Returns sequence -> {slug, category, body, width, height} of the icons of one style that are kept."""
    category = {slug: name for name, slugs in metadata["categories"].items() for slug in slugs}
    twins = collections.defaultdict(list)
    for codepoints, slug in chars.items():
        icon = icons["icons"].get(slug)
        if icon is not None and not icon.get("hidden") and not _SKIN_TONE.search(codepoints):
            size = (icon.get("width", icons["width"]), icon.get("height", icons["height"]))
            twins[icon["body"]].append((len(slug), slug, sequence(codepoints), size))
    kept = {}
    for body, same in twins.items():
        _, slug, key, (width, height) = min(same)
        if key in kept:
            raise ValueError(f"{key} names both {kept[key]['slug']!r} and {slug!r}")
        kept[key] = {"slug": slug, "category": category[slug], "body": body, "width": width, "height": height}
    return kept


def build(sets: dict[str, list[Any]], emojibase: list[dict[str, Any]]) -> dict[str, bytes]:
    """Returns file name -> bytes of the built set.

    Args:
      sets: style -> [icons.json, metadata.json, chars.json], in order of preference.
      emojibase: emojibase's en/data.json.
    """
    known = {sequence(e["hexcode"]): e for e in emojibase}
    styles = {style: unique_icons(*files) for style, files in sets.items()}

    concepts = {}
    for kept in styles.values():
        for key, icon in kept.items():
            if key not in concepts:
                entry = known.get(key, {})
                name = plain_name(entry.get("label", icon["slug"].replace("-", " ")))
                concepts[key] = [icon["slug"], name, key, CATEGORIES.index(icon["category"]), entry.get("tags", [])]
    rows = sorted(concepts.values())
    for column in (0, 1):  # ids and names
        repeated = [v for v, n in collections.Counter(row[column] for row in rows).items() if n > 1]
        if repeated:
            raise ValueError(f"several concepts are called {repeated}")
    order = {row[2]: i for i, row in enumerate(rows)}

    files, pictures = {}, {}
    for style, kept in styles.items():
        keys = sorted(kept, key=order.__getitem__)
        svg = "\n".join(kept[k]["body"] for k in keys).encode()
        if svg.count(b"\n") != len(keys) - 1:
            raise ValueError(f"an icon of {style} holds a line break, which separates icons here")
        files[f"{style}.svg.xz"] = lzma.compress(svg, filters=_XZ)
        table = [[order[k], kept[k]["slug"], kept[k]["width"], kept[k]["height"]] for k in keys]
        pictures[style] = {"sha256": hashlib.sha256(svg).hexdigest(), "rows": table}
    index = {"categories": CATEGORIES, "concepts": rows, "pictures": pictures}
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    return {"index.json.xz": lzma.compress(text.encode(), filters=_XZ), **files}


def main(packages: Path, output: Path) -> None:
    """Reads the four packages in the folder `packages`, writes the set into `output`."""
    members = ("icons.json", "metadata.json", "chars.json")
    sets = {style: read_members(packages / p.filename, p, members) for style, p in STYLES.items()}
    [emojibase] = read_members(packages / NAMES.filename, NAMES, ("en/data.json",))
    for name, data in build(sets, emojibase).items():
        (output / name).write_bytes(data)
        print(f"{output / name}: {len(data):,} bytes")


if __name__ == "__main__":
    cli.run(lambda: main(Path(PACKAGES.value), Path(OUTPUT.value)))
