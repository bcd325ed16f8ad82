"""What is released agrees with itself: versions, the lock file, the commands, the links of the README's first lines."""

import pathlib
import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert PROJECT["version"] == newest[1] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]


def test_the_lock_has_every_dependency_within_its_range():
    locked: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements-dev.lock").read_text().splitlines():
        if not line.startswith(("#", " ")):
            locked.setdefault(canonicalize_name(Requirement(line).name), []).append(Requirement(line))
    wanted = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]
    for requirement in wanted:
        pins = [next(iter(pin.specifier)).version for pin in locked.get(canonicalize_name(requirement.name), [])]
        assert pins, f"requirements-dev.lock lacks {requirement.name}: make lock"
        assert all(requirement.specifier.contains(pin) for pin in pins), f"{requirement} against {pins}: make lock"


def test_files_that_issue_templates_name_are_forms():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.stem != "config":
            assert {"name", "description", "body"} <= form.keys()
            assert all(field["attributes"]["label"] for field in form["body"])


def test_configs_are_in_the_package_by_a_link():
    assert (ROOT / "imagegpt_jax" / "configs").resolve() == ROOT / "configs"
