"""The matrix of what is read and written, as text and as a page."""

from imagegpt_jax.convert.formats import FORMATS

_HEADER = ("layout (--to)", "what", "reads", "writes")


def rows() -> list[tuple[str, str, str, str]]:
    """One row for each published layout."""
    return [(name, f"{f.kind}: {f.title}", f.files, f.writes) for name, f in FORMATS.items()]


def text() -> str:
    """The matrix for a terminal."""
    table = [_HEADER, *rows()]
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in table).replace("`", "")
