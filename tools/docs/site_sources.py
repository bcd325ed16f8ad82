"""Gathers the sources of the site in one folder: docs/, texts that have their home elsewhere, the reference of config
keys, and the notebooks as Markdown.

A text has one home. The site's first page is README.md, "Launch on clusters" is launch/README.md, and so on: they are
taken as they are, with links that fit their place in the site. `make docs` runs this, then the generator:

    python tools/docs/site_sources.py --output=build/docs
"""

import json
import pathlib
import posixpath
import re
import shutil

import config_keys
from absl import flags

from imagegpt_jax import cli
from imagegpt_jax.errors import UserError

OUTPUT = flags.DEFINE_string(
    "output", "build/docs", "Folder to write the sources of the site into; new, or of an earlier call."
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
# File of the repository -> its place in the site. What is in docs/ has its own place.
ELSEWHERE = {
    "README.md": "index.md",
    "launch/README.md": "launching.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "imagegpt_jax/data/emoji/ATTRIBUTION.md": "attribution.md",
    "LICENSE": "LICENSE.txt",
}
_MARK = ".sources-of-the-site"
_CODE = re.compile(r"(^```.*?^```$|^ {4}.*?$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_TARGET = re.compile(r"\]\(([^)\s]+)\)")


def place_of(home: str) -> str:
    """Where a file of the repository is in the site, whether or not the site has it."""
    place = ELSEWHERE.get(home, home.removeprefix("docs/"))
    return place.removesuffix(".ipynb") + ".md" if place.endswith(".ipynb") else place


def pages() -> dict[str, str]:
    """Place in the site -> text of every page."""
    homes = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    homes += [home for home in ELSEWHERE if home.endswith(".md")]
    texts = {place_of(home): relinked((ROOT / home).read_text(), home) for home in homes}
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        home = path.relative_to(ROOT).as_posix()
        texts[place_of(home)] = relinked(_of_notebook(path), home)
    return texts | {place: page() for place, page in config_keys.PAGES.items()}


def relinked(text: str, home: str) -> str:
    """A page whose links lead to places in the site; what the site does not have is named, not linked.

    Args:
      text: Markdown.
      home: its file in the repository.
    """
    here, folder = place_of(home), posixpath.dirname(home)

    def target_of(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        file = posixpath.normpath(posixpath.join(folder, path))
        if "://" in match[1] or not path or not (ROOT / file).exists():
            return match[0]  # a page that is generated, or a mistake, which the generator tells
        there = posixpath.relpath(place_of(file), posixpath.dirname(here) or ".")
        return f"]({there}{mark}{anchor})"

    parts = _CODE.split(text)
    parts[::2] = [_TARGET.sub(target_of, _named(part, folder)) for part in parts[::2]]
    return "".join(parts)


def _named(text: str, folder: str) -> str:
    """Links to files that the site does not have, without the link."""

    def replace(match: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(folder, match[2].partition("#")[0]))
        inside = file in ELSEWHERE or file.startswith("docs/")
        return match[0] if inside or "://" in match[2] or not (ROOT / file).exists() else match[1]

    return re.sub(r"(?<!!)\[([^\[\]]*)\]\(([^)\s#][^)\s]*)\)", replace, text)


def _of_notebook(path: pathlib.Path) -> str:
    """A notebook as Markdown: code in blocks, with the outputs it was saved with, pictures within the page."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{''.join(data['image/png'].split())})")
            else:
                shown = "".join(output.get("text") or data.get("text/plain", ())).rstrip()
                parts.append(f"```text\n{shown}\n```")
    return "\n\n".join(parts) + "\n"


def gather(output: pathlib.Path) -> None:
    """Writes the sources into a folder of their own, in place of those that an earlier call wrote.

    Raises:
      UserError: for a folder that holds anything else.
    """
    if output.exists() and not (output / _MARK).exists():
        raise UserError(f"--output={output} is a folder of something else: give one that is not there yet.")
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(ROOT / "docs", output, ignore=shutil.ignore_patterns("*.md", "*.ipynb", ".ipynb_checkpoints"))
    for place, text in pages().items():
        (output / place).parent.mkdir(parents=True, exist_ok=True)
        (output / place).write_text(text)
    for home, place in ELSEWHERE.items():
        if not home.endswith(".md"):
            shutil.copy(ROOT / home, output / place)
    (output / _MARK).write_text("written by tools/docs/site_sources.py\n")


def main() -> None:
    """Gathers the sources."""
    gather(pathlib.Path(OUTPUT.value))


if __name__ == "__main__":
    cli.run(main)
