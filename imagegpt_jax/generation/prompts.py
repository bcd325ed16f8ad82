"""What a person asks the sampling binary for: prompts from flags and files, checked before anything starts."""

import csv
import dataclasses
import io
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from imagegpt_jax.errors import UserError, suggest

MAX_PROMPT = 2000  # characters; a longer line is not a prompt
# Names of the column with prompts, in this order; PartiPrompts has "Prompt".
COLUMNS = ("prompt", "caption", "text")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing to draw.

    Attributes:
      text: prompt; "" for none.
      label: class, by name or number; None for none.
    """

    text: str = ""
    label: str | None = None

    @property
    def caption(self) -> str:
        """What to write under its pictures."""
        return self.text or ("(no prompt)" if self.label is None else f"class {self.label}")


def check_prompt(text: str, where: str) -> str:
    """Returns the prompt without white space around it.

    Raises:
      UserError: naming `where` it is, if it is too long or no text.
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
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as e:
        raise UserError(f"--prompts_file={path} cannot be read ({e.strerror}): give a text file.") from None
    lines = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError:
            raise UserError(f"line {number} of {path} is not UTF-8 text: save the file as UTF-8.") from None
    delimiter = DELIMITERS.get(Path(path).suffix.lower())
    found = _column(lines, delimiter, path, column) if delimiter else enumerate(lines, start=1)
    prompts = []
    for number, line in found:
        text = check_prompt(line, f"line {number} of {path}")
        if text and (delimiter or not text.startswith("#")):
            prompts.append(text)
    if not prompts:
        raise UserError(f"{path} has no prompts: write one on each line.")
    return prompts


def _column(lines: list[str], delimiter: str, path: str, column: str) -> Iterator[tuple[int, str]]:
    """(number of the line that it ends on, text) of each row of a table."""
    rows = csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter)
    header = [name.strip() for name in next(rows, [])]
    plain = [name.casefold() for name in header]
    wanted = [column.casefold()] if column else [name for name in COLUMNS if name in plain]
    if not wanted or wanted[0] not in plain:
        raise UserError(
            f"{path} has no column {column or COLUMNS[0]!r}: give --prompt_column.{suggest(column, header)}"
        )
    index = plain.index(wanted[0])
    for row in rows:
        if len(row) > index:
            yield rows.line_num, row[index]


def file_name(index: int, caption: str) -> str:
    """A file name that is safe anywhere, such as "00003-a-red-bicycle.png"."""
    ascii_text = unicodedata.normalize("NFKD", caption).encode("ascii", "ignore").decode().lower()
    slug = "-".join(re.findall(r"[a-z0-9]+", ascii_text))[:48].strip("-")
    return f"{index:05d}{'-' if slug else ''}{slug}.png"
