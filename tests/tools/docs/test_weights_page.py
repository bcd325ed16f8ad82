"""The page of what is read and written is that of the code and of what the parity tests showed."""

import json
import pathlib

from imagegpt_jax.convert.formats import FORMATS

DOCS = pathlib.Path(__file__).resolve().parents[3] / "docs"


def read(name):
    return json.loads((DOCS / name).read_text())


def test_the_page_is_up_to_date(load_tool):
    """If this fails: `make parity` writes it."""
    page = load_tool("docs/weights_page.py").page
    assert (DOCS / "weights.md").read_text() == page(read("weights.json"), read("import_memory.json"))


def test_every_layout_is_compared_with_its_reference_and_written_back():
    shown = read("weights.json")
    assert set(shown) == set(FORMATS)
    for name, entry in FORMATS.items():
        assert "bits" in shown[name], name
        assert ("codes" if entry.kind == "tokenizer" else "logits") in shown[name], name


def test_a_check_that_no_test_made_is_not_on_the_page(load_tool):
    page = load_tool("docs/weights_page.py").page
    shown = {**read("weights.json"), "llama": ["bits"]}
    before, after = (page(s, read("import_memory.json")) for s in (read("weights.json"), shown))
    row = next(line for line in after.splitlines() if line.startswith("| `llama`"))
    assert row.count("✓") == 1
    assert before.count("✓") > after.count("✓")


def test_import_of_3b_peaks_below_the_bound():
    """The recorded run of tools/benchmarks/import_memory.py."""
    figures = read("import_memory.json")
    assert any(name.startswith("3B") for name in figures)
    for name, figure in figures.items():
        assert figure["load_decoder"] < 1.3, name
        assert figure["convert"] < 1.3, name
