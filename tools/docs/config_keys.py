"""Reference of config keys, for the site: every key with its default and what it means.

Nothing is written twice: meanings come from the comments of the config files and from the docstrings of what reads the
keys. A key that has neither is an error, so the pages are complete.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import io
import pathlib
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from imagegpt_jax import config as config_lib
from imagegpt_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
# Config file -> its default size, the others, and the keys of each dict that a docstring explains: module and class, or
# module alone where its own docstring has the table.
FILES: Mapping[str, tuple[tuple[str, ...], Mapping[str, tuple[str, str]]]] = {
    "tokenizer.py": (
        ("emoji", "test", "vq16", "vq8"),
        {
            "model": ("imagegpt_jax.models.vq", "VQConfig"),
            "model.quantizer": ("imagegpt_jax.models.quantizers", "QuantizerConfig"),
            "discriminator": ("imagegpt_jax.models.discriminator", "DiscriminatorConfig"),
            "loss": ("imagegpt_jax.tasks.tokenizer.adversarial", "LossConfig"),
            "optim": ("imagegpt_jax.training.optimizers", ""),
            "discriminator_optim": ("imagegpt_jax.training.optimizers", ""),
        },
    ),
    "decoder.py": (
        ("emoji", "test", "B", "L", "XL", "XXL", "3B", "7B", "20B"),
        {
            "model": ("imagegpt_jax.models.gpt_config", "GPTConfig"),
            "model.rope_scaling": ("imagegpt_jax.models.rope", "RopeScaling"),
            "optim": ("imagegpt_jax.training.optimizers", ""),
            "sampling": ("imagegpt_jax.sampling.settings", "Sampling"),
        },
    ),
}
# A whole config within a config: its keys are those of the other file.
NESTED = "untrained_tokenizer"


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config.

    Attributes:
      name: dotted, as in `--config.NAME=`.
      values: size -> default.
      meaning: in Markdown.
    """

    name: str
    values: Mapping[str, Any]
    meaning: str


def keys(file: str) -> list[Key]:
    """All keys of a config file, in the order in which it and the docstrings explain them.

    Raises:
      UserError: if one is explained nowhere, or a dict of a config has different keys in two sizes.
    """
    sizes, _ = FILES[file]
    get_config = config_lib.sibling(str(CONFIGS / "x.py"), file).get_config
    flat = {size: config_lib.flatten(_without_nested(get_config(f"size={size}").to_dict())) for size in sizes}
    if any(values.keys() != flat[sizes[0]].keys() for values in flat.values()):
        raise UserError(f"configs/{file} has different keys at different sizes: make them the same.")
    names = sorted(flat[sizes[0]], key=_order(file))
    meanings = {name: meaning_of(file, name) for name in names}
    if missing := [name for name, meaning in meanings.items() if not meaning]:
        raise UserError(
            f"configs/{file} does not say what {', '.join(missing)} mean: write a comment beside each, or an entry in"
            " the docstring of what reads it."
        )
    return [Key(name, {size: flat[size][name] for size in sizes}, meanings[name]) for name in names]


def _order(file: str) -> Callable[[str], Any]:
    """Sorts keys: those at the top first, then dict by dict as the file has them, or a docstring its entries."""
    places, everywhere = (
        [name for path in paths for name, _, _ in sorted(_places(_source(path)), key=lambda place: place[1])]
        for paths in ([file], FILES)
    )

    def rank(name: str) -> Any:
        folder, _, last = name.rpartition(".")
        entries = list(_docstring_entries(*FILES[file][1].get(folder, ("builtins", ""))))
        if not folder or last not in entries:
            entries, last = [*places, *everywhere], name
        return bool(folder), places.index(folder) if folder in places else 0, folder, entries.index(last)

    return rank


def meaning_of(file: str, name: str) -> str:
    """What a key means; "" if nothing says it. Keys that both files have may be explained in either."""
    folder, _, last = name.rpartition(".")
    docstrings = FILES[file][1]
    if folder in docstrings and last in (entries := _docstring_entries(*docstrings[folder])):
        return entries[last]
    others = [other for other in FILES if other != file]
    return next(filter(None, (_comments(path).get(name, "") for path in (file, *others))), "")


def _without_nested(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != NESTED}


# --------------------------------------------------------------------------------------------------------- Docstrings


@functools.cache
def _docstring_entries(module: str, name: str) -> dict[str, str]:
    """Name -> meaning: the "Attributes:" of a class, or the table of names in a module's docstring."""
    read = importlib.import_module(module)
    doc = inspect.getdoc(getattr(read, name) if name else read) or ""
    entries: dict[str, str] = {}
    if name:
        lines = textwrap.dedent(doc.partition("Attributes:\n")[2]).splitlines()
        pattern = re.compile(r"(\w+): (.*)")
    else:
        lines = textwrap.dedent("\n".join(line for line in doc.splitlines() if line.startswith("    "))).splitlines()
        pattern = re.compile(r"(\w+(?:, \w+)*) {2,}(.*)")
    last = ""
    for line in lines:
        if match := pattern.fullmatch(line):
            last = match[1]
            entries[last] = match[2]
        elif line.startswith(" ") and last:
            entries[last] += f" {line.strip()}"
        elif line:
            last = ""
    return {name: text for names, text in entries.items() for name in names.split(", ")}


# ----------------------------------------------------------------------------------------------------------- Comments


@functools.cache
def _comments(file: str) -> dict[str, str]:
    """Key -> the comment beside it, or the lines of comment above it, in a config file."""
    beside: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO((CONFIGS / file).read_text()).readline):
        if token.type == tokenize.COMMENT:
            whole = not token.line[: token.start[1]].strip()
            (above if whole else beside)[token.start[0]] = token.string.lstrip("# ")
    texts: dict[str, str] = {}
    for name, first, last in _places(_source(file)):
        text = beside.get(last, "") or _block(above, first)
        if text and text != "fmt: skip":
            texts.setdefault(name, text)
    return texts


def _source(file: str) -> ast.Module:
    return ast.parse((CONFIGS / file).read_text())


def _block(above: Mapping[int, str], line: int) -> str:
    """The lines of comment that end above a line, without the title of a section ("--- Data: where from")."""
    lines: list[str] = []
    while (line := line - 1) in above:
        lines.insert(0, above[line])
    section, _, text = " ".join(lines).partition(": ") if lines and lines[0].startswith("---") else ("", "", "")
    return text if section else " ".join(lines)


def _places(tree: ast.AST) -> Iterator[tuple[str, int, int]]:
    """(key, first line, last line) of what `get_config` assigns to `config`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("config."):
            name = ast.unparse(node.targets[0]).removeprefix("config.")
            yield name, node.lineno, node.end_lineno or node.lineno
            yield from _within(node.value, name)


def _within(value: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
    if not isinstance(value, ast.Dict):
        return
    if value.lineno == value.end_lineno:  # a comment beside it is of all its keys together
        return
    for key, item in zip(value.keys, value.values, strict=True):
        if isinstance(key, ast.Constant):
            name = f"{prefix}.{key.value}"
            yield name, key.lineno, item.end_lineno or key.lineno
            yield from _within(item, name)


# --------------------------------------------------------------------------------------------------------------- Page


def page(file: str) -> str:
    """The reference of a config file, in Markdown."""
    sizes, _ = FILES[file]
    title, _, rest = (config_lib.sibling(str(CONFIGS / "x.py"), file).__doc__ or "").partition("\n")
    lines = [
        f"# Config keys: configs/{file}",
        "",
        "Any key is set on the command line: `--config.KEY=VALUE`. The default is that of"
        f" `size={sizes[0]}`; sizes that differ follow the meaning.",
        "",
        "```text",
        title,
        textwrap.dedent(rest).strip("\n"),
        "```",
    ]
    group: str | None = None
    for key in keys(file):
        folder = key.name.rpartition(".")[0]
        if folder != group:
            group = folder
            heading = f"## {folder}" if folder else "## Top level"
            lines += ["", heading, "", "| key | default | meaning |", "|---|---|---|"]
        lines.append(_row(key, sizes[0]))
    if file == "decoder.py":
        lines += [
            "",
            f"## {NESTED}",
            "",
            "The shape of the tokenizer that stands in where `tokenizer` is empty: a whole config of"
            " `configs/tokenizer.py`, with [its keys](config_tokenizer.md).",
        ]
    return "\n".join(lines) + "\n"


def _row(key: Key, size: str) -> str:
    default = _shown(key.values[size])
    others: dict[str, list[str]] = {}
    for other, value in key.values.items():
        if (text := _shown(value)) != default:
            others.setdefault(text, []).append(other)
    meaning = key.meaning[:1].upper() + key.meaning[1:].rstrip(".") + "."
    differing = "; ".join(f"{', '.join(names)}: {text}" for text, names in others.items())
    cells = (
        f'<span id="{key.name}"></span><code>{key.name.replace(".", ".<wbr>").replace("_", "_<wbr>")}</code>',
        default,
        f"{meaning} *Sizes* {differing}." if others else meaning,
    )
    return f"| {' | '.join(_escape(cell) for cell in cells)} |"


def _escape(cell: str) -> str:
    """A cell whose bars do not end it: within code they stand as they are."""
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in re.split(r"(`[^`]*`)", cell))


def _shown(value: Any) -> str:
    return f"`{value!r}`" if not isinstance(value, str) else f'`"{value}"`'


PAGES: Mapping[str, Callable[[], str]] = {
    "reference/config_tokenizer.md": lambda: page("tokenizer.py"),
    "reference/config_decoder.md": lambda: page("decoder.py"),
}
