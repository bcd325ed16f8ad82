"""The site's sources: links lead somewhere, code compiles, every page is in the menu, every config key is explained."""

import importlib
import pathlib
import re

import pytest
import yaml

from imagegpt_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.md")])
IDS = [path.relative_to(ROOT).as_posix() for path in TEXTS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```$|^ {4}.*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


@pytest.fixture
def site(load_tool):
    return load_tool("docs/site_sources.py")


@pytest.fixture
def config_keys(load_tool):
    return load_tool("docs/config_keys.py")


def anchors(text):
    """What the headings of a page, and the marks within it, are linked by."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<(?:span|a) id="([^"]+)"', text))


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_links_lead_somewhere(path, config_keys):
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", path.read_text())):
        if re.match(r"\w+:", target):
            assert target.startswith("https://"), target
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        generated = config_keys.PAGES.get(str(there.relative_to(ROOT)).removeprefix("docs/"))
        assert there.exists() or generated, f"{target} is not there"
        if anchor:
            assert anchor in anchors(generated() if generated else there.read_text()), f"{target} has no such heading"


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_python_blocks_compile(path):
    for language, code in FENCE.findall(path.read_text()):
        if language == "python":
            compile(code, str(path), "exec")


def test_objects_of_the_reference_are_there():
    for path in ROOT.glob("docs/reference/*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", path.read_text(), re.MULTILINE):
            module, _, last = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), last), name


def test_every_public_name_is_in_the_reference():
    import imagegpt_jax as ig

    text = "\n".join(path.read_text() for path in ROOT.glob("docs/reference/*.md"))
    named = set(re.findall(r"^::: imagegpt_jax\.(?:\w+\.)*(\w+)$", text, re.MULTILINE))
    functions = {name for name in ig.__all__ if getattr(ig, name).__module__ == "imagegpt_jax.generation.functional"}
    assert "functional" in named
    assert set(ig.__all__) - functions <= named


def menu(entry):
    if isinstance(entry, str):
        return {entry}
    return set().union(*map(menu, entry.values() if isinstance(entry, dict) else entry))


def test_every_page_is_in_the_menu(site):
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert menu(config["nav"]) | set(config["not_in_nav"].split()) == set(site.pages())


def test_links_fit_their_place_in_the_site(site):
    text = "[a](docs/sampling.md#modes) ![b](docs/grid.png) `[c](docs/x.md)` [d](Makefile) [e](https://x.org) [f](#top)"
    assert site.relinked(text, "README.md") == (
        "[a](sampling.md#modes) ![b](grid.png) `[c](docs/x.md)` d [e](https://x.org) [f](#top)"
    )
    assert site.relinked("[a](../README.md)", "launch/README.md") == "[a](index.md)"
    assert site.relinked("[a](../docs/scale.md)", "launch/README.md") == "[a](scale.md)"
    assert site.relinked("[a](../weights.md) [b](first_steps.ipynb)", "docs/notebooks/train_on_a_folder.ipynb") == (
        "[a](../weights.md) [b](first_steps.md)"
    )


def test_sources_are_written_again_and_nothing_else_is_deleted(load_tool, tmp_path):
    output = tmp_path / "docs"
    tool = load_tool("docs/site_sources.py", f"--output={output}")
    tool.main()
    (output / "left.md").write_text("of an earlier call")
    tool.main()
    assert not (output / "left.md").exists()
    assert "# First steps" in (output / "notebooks" / "first_steps.md").read_text()
    assert {"index.md", "grid.png", "scale.json", "LICENSE.txt"} <= {path.name for path in output.iterdir()}
    with pytest.raises(UserError, match="something else"):
        load_tool("docs/site_sources.py", f"--output={tmp_path}").main()


def test_every_config_key_is_explained(config_keys):
    for file in config_keys.FILES:
        keys = {key.name: key for key in config_keys.keys(file)}
        assert all(len(key.meaning) > 10 for key in keys.values())
        assert "learning rate" in keys["optim.lr"].meaning
        assert "gradient accumulation" in keys["accumulate"].meaning
        assert len(set(keys["steps"].values.values())) > 1
    page = config_keys.page("decoder.py")
    assert '<span id="sampling.cfg_scale"></span>' in page
    assert "classifier-free guidance" in page.lower()


def test_a_key_without_an_explanation_is_an_error(config_keys, tmp_path, monkeypatch):
    for file in config_keys.FILES:
        text = (config_keys.CONFIGS / file).read_text()
        text = text.replace("    config.seed = 0", "    config.unheard_of = 1\n    config.seed = 0")
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(config_keys, "CONFIGS", tmp_path)
    with pytest.raises(UserError, match="does not say what unheard_of mean: write a comment"):
        config_keys.keys("tokenizer.py")
