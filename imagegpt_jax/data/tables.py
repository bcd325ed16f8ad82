"""Tables of words: captions and prompts, from lines of text, JSON lines, .csv or .tsv, with the line of each row."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from imagegpt_jax.errors import UserError

# What separates the fields of a table that begins with a header.
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".json")


def decode(data: bytes, path: epath.PathLike) -> str:
    """The text of a file, without byte order mark and with plain line ends.

    Raises:
      UserError: naming the line that is not UTF-8.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise UserError(f"line {line} of {path} is not UTF-8 text: save the file as UTF-8.") from None


def rows(
    text: str, path: epath.PathLike, ending: str, *, ragged: bool = False, any_line_end: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table; blank lines are skipped.

    Args:
      text: of the file.
      path: of the file, for errors.
      ending: ".csv" or ".tsv" (a header, then fields as it names them), ".jsonl" or ".json" (an object on each line),
        or anything else (a text on each line, which becomes {"text": line}).
      ragged: whether a row of .csv or .tsv may have more fields than the header (they are dropped) or fewer (None).
      any_line_end: whether lines end at all that `str.splitlines` knows, not at line feeds alone.

    Yields:
      (number of the line that the row ends on, its fields by name).

    Raises:
      UserError: naming the line that is no row.
    """
    if ending in DELIMITERS:
        lines = text.splitlines() if any_line_end else io.StringIO(text, newline="")
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of a long text the caller says what is wrong
        yield from _fields(csv.reader(lines, delimiter=DELIMITERS[ending]), path, ragged)
        return
    for number, line in enumerate(text.splitlines() if any_line_end else text.split("\n"), start=1):
        if line.strip():
            yield number, _object(line, f"{path}, line {number}") if ending in JSON_LINES else {"text": line}


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e}).") from e
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected an object such as {{"file_name": ..., "text": ...}}.')
    return row


def _fields(reader: Any, path: epath.PathLike, ragged: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        header = next(reader, [])
        for values in filter(None, reader):
            missing = len(header) - len(values)
            if missing and not ragged:
                raise UserError(
                    f"{path}, line {reader.line_num}: {'fewer' if missing > 0 else 'more'} fields than the header has"
                    " (put a caption with commas in double quotes)."
                )
            yield reader.line_num, dict(zip(header, [*values, *[None] * missing], strict=False))
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({e}).") from e
