"""Prompts of a person, from files too, checked before anything starts; and how they are shown."""

import re
import unicodedata
from pathlib import Path

from imagegpt_jax.data import tables
from imagegpt_jax.errors import UserError, suggest

MAX_PROMPT = 2000  # characters; a longer line is not a prompt
# Names of the column with prompts, in this order; PartiPrompts has "Prompt".
COLUMNS = ("prompt", "caption", "text")


def title(prompt: str, label: int | str | None) -> str:
    """What to write under the images of a prompt or a class."""
    return prompt or ("(no prompt)" if label is None else f"class {label}")


def check_prompt(text: str, where: str) -> str:
    """The prompt without white space around it.

    Raises UserError, naming `where` it is, if it is too long or no text.
    """
    if len(text) > MAX_PROMPT:
        raise UserError(f"{where} has {len(text)} characters: a prompt has at most {MAX_PROMPT}.")
    if any(unicodedata.category(c) == "Cs" or c == "\0" for c in text):
        raise UserError(f"{where} is not text: prompts are UTF-8.")
    return text.strip()


def read_prompts(path: str, column: str = "") -> list[str]:
    """Reads a prompts file: one prompt a line, or a .csv or .tsv with a header, such as PartiPrompts'.

    Args:
      path: of the file; blank lines are skipped, and in plain text lines beginning with #.
      column: of a table; "" takes the first of `COLUMNS` that it has.

    Raises:
      UserError: if it cannot be read, has a line that is not UTF-8 or too long (naming the line), or has no prompt.
    """
    try:
        text = tables.decode(Path(path).read_bytes(), path)
    except OSError as e:
        raise UserError(f"--prompts_file={path} cannot be read ({e.strerror}): give a text file.") from None
    ending = Path(path).suffix.lower()
    is_table = ending in tables.DELIMITERS
    rows = list(tables.rows(text, path, ending if is_table else ".txt", ragged=True))
    name = _column(list(rows[0][1]), path, column) if is_table and rows else "text"
    prompts = []
    for number, row in rows:
        prompt = check_prompt(row[name] or "", f"line {number} of {path}")
        if prompt and (is_table or not prompt.startswith("#")):
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} has no prompts: write one on each line.")
    return prompts


def _column(names: list[str], path: str, column: str) -> str:
    """The name in a table's header of the column with prompts."""
    plain = [name.strip().casefold() for name in names]
    wanted = [column.casefold()] if column else [name for name in COLUMNS if name in plain]
    if not wanted or wanted[0] not in plain:
        raise UserError(f"{path} has no column {column or COLUMNS[0]!r}: give --prompt_column.{suggest(column, names)}")
    return names[plain.index(wanted[0])]


def file_name(index: int, caption: str) -> str:
    """A file name that is safe anywhere, such as "00003-a-red-bicycle.png"."""
    ascii_text = unicodedata.normalize("NFKD", caption).encode("ascii", "ignore").decode().lower()
    slug = "-".join(re.findall(r"[a-z0-9]+", ascii_text))[:48].strip("-")
    return f"{index:05d}{'-' if slug else ''}{slug}.png"
