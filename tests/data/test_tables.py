"""The one reader of captions and prompts: what each ending becomes, and what is wrong with a line."""

import pytest

from imagegpt_jax.data import tables
from imagegpt_jax.errors import UserError


@pytest.mark.parametrize(
    ("ending", "text", "expected"),
    [
        (".txt", "a cat\n\n# a dog\n", [(1, {"text": "a cat"}), (3, {"text": "# a dog"})]),
        (".jsonl", '{"text": "a\u2028b"}\n\n{"text": 3}', [(1, {"text": "a\u2028b"}), (3, {"text": 3})]),
        (".csv", 'file,text\n1.png,"a, b\nc"\n\n2.png,d\n',
         [(3, {"file": "1.png", "text": "a, b\nc"}), (5, {"file": "2.png", "text": "d"})]),
        (".tsv", 'Prompt\tChallenge\r\na "cat"\tBasic\r\n', [(2, {"Prompt": 'a "cat"', "Challenge": "Basic"})]),
        (".csv", "", []),
    ],
)  # fmt: skip
def test_rows(ending, text, expected):
    assert list(tables.rows(text, "f" + ending, ending)) == expected


def test_other_line_ends():
    assert [row["text"] for _, row in tables.rows("a\u2028b\n", "f", ".txt", any_line_end=True)] == ["a", "b"]
    assert [row["text"] for _, row in tables.rows("a\u2028b\n", "f", ".txt")] == ["a\u2028b"]
    (row,) = tables.rows('x\n"a\nb"\n', "f", ".csv", any_line_end=True)
    assert row == (3, {"x": "ab"})


def test_ragged_rows():
    text = "a,b\n1\n1,2,3\n"
    assert list(tables.rows(text, "f", ".csv", ragged=True)) == [(2, {"a": "1", "b": None}), (3, {"a": "1", "b": "2"})]
    with pytest.raises(UserError, match="f, line 2: fewer fields than the header"):
        list(tables.rows(text, "f", ".csv"))
    with pytest.raises(UserError, match="f, line 2: more fields than the header"):
        list(tables.rows("a,b\n1,2,3\n", "f", ".csv"))


@pytest.mark.parametrize(
    ("ending", "text", "message"),
    [
        (".jsonl", '{"text": "a"}\n{"text"\n', "f, line 2: not JSON"),
        (".jsonl", "[1]\n", "f, line 1: expected an object"),
        (".csv", "a,b\nx\r1\n,y\n", "fewer fields"),
    ],
)
def test_a_bad_line_is_named(ending, text, message):
    with pytest.raises(UserError, match=message):
        list(tables.rows(text, "f", ending))


def test_decode():
    assert tables.decode(b"\xef\xbb\xbfa\r\nb", "f") == "a\nb"
    with pytest.raises(UserError, match="line 2 of f is not UTF-8"):
        tables.decode(b"a\n\xc3\nb", "f")
