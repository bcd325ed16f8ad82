"""Prompts from files, and the file names of their images."""

import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import prompts


def test_prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\n  # comment\n# other\n  zwei Räder 🚲 \nlast".encode())
    assert prompts.read_prompts(str(path)) == ["one", "zwei Räder 🚲", "last"]


def test_tables_of_prompts(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text('Prompt\tCategory\tNote\n# a red fox\tAnimals\t\n\ttoo few\n"two\nlines"\tArts\t\n')
    assert prompts.read_prompts(str(path)) == ["# a red fox", "two\nlines"]
    path = tmp_path / "prompts.CSV"
    path.write_text('\ufeffid,Text,other\r\n1,"a fox, red",x\r\n2,dog,y\r\n', encoding="utf-8")
    assert prompts.read_prompts(str(path)) == ["a fox, red", "dog"]
    assert prompts.read_prompts(str(path), "other") == ["x", "y"]
    with pytest.raises(UserError, match="no column 'othr'.*Did you mean 'other'"):
        prompts.read_prompts(str(path), "othr")
    path.write_text("id,name\n1,a\n")
    with pytest.raises(UserError, match="no column 'prompt'"):
        prompts.read_prompts(str(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"good\nbad \xff\xfe line\n", "line 2 of .* is not UTF-8"),
        (b"good\n\n" + b"x" * 2001, "line 3 of .* has 2001 characters"),
        (b"good\nnul\0\n", "line 2 of .* is not text"),
        (b"# nothing\n\n", "has no prompts"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        prompts.read_prompts(str(path))


def test_file_names_are_safe():
    file_name = prompts.file_name
    assert file_name(3, "A red, Red bicycle!") == "00003-a-red-red-bicycle.png"
    assert file_name(0, "../..\\x:*\n") == "00000-x.png"
    assert file_name(12, "自転車") == "00012.png"
    assert file_name(1, "Café") == "00001-cafe.png"
    assert len(file_name(1, "word " * 500)) < 64
