"""docs/troubleshooting.md quotes messages as the code has them: what differs from case to case is written `…`."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEADINGS = re.findall(r"^### `([^`]+)`(?! \(from)", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


def texts(source):
    """The strings of a program, of f-strings with `…` for their values."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


TEXTS = {text for path in (ROOT / "imagegpt_jax").rglob("*.py") for text in texts(path.read_text())}


def stands(quote):
    parts = [part for part in quote.replace("'…'", "…").split("…") if part.strip()]
    return any(re.search(".*?…".join(map(re.escape, parts)), text, re.DOTALL) for text in TEXTS)


def test_the_page_has_messages_and_none_twice():
    assert len(HEADINGS) == len(set(HEADINGS)) > 60


@pytest.mark.parametrize("quote", HEADINGS)
def test_every_quoted_message_stands_in_the_code(quote):
    assert stands(quote)


def test_other_messages_do_not():
    assert not stands("the config has no such key: …")
    assert not stands("… holds a run of another kind (…)")
