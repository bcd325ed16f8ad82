"""The floor plan: CONTRIBUTING's map is complete and in order, files are short, and what the text names is there."""

import itertools
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "imagegpt_jax"
FOLDERS = ("imagegpt_jax", "configs", "tests", "tools")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").rglob("*"), ROOT / "Makefile"]


def parts(folder):
    """The folders and Python files of a folder, as the map writes them."""
    folders = [path.parent for path in folder.glob("*/*.py") if not path.parent.is_symlink()]  # but the configs' own
    names = {f"{path.relative_to(ROOT)}/" for path in folders}
    return names | {str(path.relative_to(ROOT)) for path in folder.glob("*.py")}


def rows():
    """The paths of every row of CONTRIBUTING's map."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    return [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in lines if line.startswith("| `")]


def test_every_folder_and_file_of_the_package_has_a_row():
    mapped = list(itertools.chain(*rows()))
    assert len(mapped) == len(set(mapped))
    assert {path for path in mapped if path.startswith("imagegpt_jax/")} == parts(PACKAGE)
    assert {path for path in parts(ROOT / "tools") if path.endswith("/")} <= set(mapped)
    assert [path for path in mapped if not (ROOT / path).exists()] == []


def test_the_rows_stand_in_the_order_of_the_layers():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    expected = list(itertools.chain(*(re.findall(r"\w+", layer) for layer in layers)))
    names = [pathlib.PurePath(path).stem for row in rows() for path in row if path.startswith("imagegpt_jax/")]
    assert names == ["__init__", *expected]


def test_files_are_short_and_none_is_called_utils():
    assert [str(path) for path in SOURCES if path.read_text().count("\n") > 400] == []
    assert [str(path) for path in SOURCES if path.stem in ("utils", "util", "helpers", "misc")] == []


def test_paths_in_text_exist():
    """Pages, docstrings, comments and messages name no file that has moved."""
    pattern = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)}|docs|launch)/[\w./-]*(?:\.[a-z]+\b|/)")
    gone = {(str(text.relative_to(ROOT)), path) for text, path in matches(pattern) if not (ROOT / path).exists()}
    assert gone == set()


def test_modules_in_text_exist():
    pattern = re.compile(r"(?<![\w./-])imagegpt_jax(?!\.tar)(?:\.[a-z_]\w*)+")
    gone = {(str(text.relative_to(ROOT)), name) for text, name in matches(pattern) if not is_defined(name)}
    assert gone == set()


def matches(pattern):
    """(file, match) for every match in what is read or run; tests name files that are not there."""
    for path in [*PAGES, *SOURCES]:
        if path.is_file() and path.relative_to(ROOT).parts[0] != "tests":
            yield from ((path, match) for match in pattern.findall(path.read_text()))


def is_defined(name):
    """Whether a dotted name is a module, or its last parts occur in the module before them."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        for file in (ROOT.joinpath(*parts[:end]).with_suffix(".py"), ROOT.joinpath(*parts[:end], "__init__.py")):
            if file.exists():
                return set(parts[end:]) <= set(re.findall(r"\w+", file.read_text()))
    return False
