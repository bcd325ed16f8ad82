"""The sampling binary's folder of pictures: written as they are drawn, taken up again where a run was cut short.

Pictures grow in `.NAME.unfinished` beside the folder, each with its line in `samples.jsonl`; the finished folder takes
its name at the end.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from imagegpt_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    from imagegpt_jax.inference.loading import Decoder, Tokenizer
    from imagegpt_jax.sampling.settings import Sampling

ROWS_FILE, GRID_FILE, GIF_FILE, NPZ_FILE = "samples.jsonl", "grid.png", "samples.gif", "samples.npz"
OVERVIEWS = {GRID_FILE, GIF_FILE, NPZ_FILE}
Row = dict[str, Any]


def about(decoder: "Decoder", tok: "Tokenizer", sampling: "Sampling", seed: int) -> Row:
    """What every picture of a run says of who drew it and how."""
    return {
        "seed": seed,
        "sampler": dataclasses.asdict(sampling),
        "decoder": decoder.path,
        "step": decoder.step,
        "decoder_hash": decoder.fingerprint(),
        "tokenizer": tok.path,
        "tokenizer_step": tok.step,
        "tokenizer_hash": tok.fingerprint,
        "version": importlib.metadata.version("imagegpt_jax"),
    }


def check_output(output: "epath.Path", rows: Sequence[Row] | None, overwrite: bool) -> bool:
    """Checks before any work that the folder may be written; True if it already holds these very samples.

    Args:
      output: the folder.
      rows: the lines its samples.jsonl would have; None before they are known.
      overwrite: whether other samples may be replaced.

    Raises:
      UserError: if it holds other samples, or files that are none.
    """
    if not output.exists():
        return False
    if not output.is_dir():
        raise UserError(f"--output={output} is a file: give a folder.")
    names = {path.name for path in output.iterdir()}
    if not names:
        return False
    held = read_rows(output)
    foreign = names - {ROWS_FILE} - OVERVIEWS - {row.get("file") for row in held}
    if not held or foreign:
        raise UserError(f"--output={output} holds other files ({min(foreign or names)}): give a new folder.")
    if rows is None or overwrite:
        return False
    if same(held, rows) and all(row["file"] in names for row in rows) and GRID_FILE in names:
        return True
    raise UserError(f"--output={output} already holds other samples: give another folder, or --overwrite.")


def read_rows(folder: "epath.Path") -> list[Row]:
    """The lines of a folder's samples.jsonl; a last line that was cut off, or a file that is none, is left out."""
    rows = []
    if (folder / ROWS_FILE).exists():
        with contextlib.suppress(ValueError):
            for line in (folder / ROWS_FILE).read_text().splitlines():
                rows.append(json.loads(line))
    return rows


def same(held: Sequence[Row], planned: Sequence[Row]) -> bool:
    """Whether lines are those planned, but for what is known only when a picture is drawn (under "found")."""
    plain = json.loads(json.dumps(list(planned)))
    return [_asked(row) for row in held] == [_asked(row) for row in plain]


def _asked(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "found"}


def start(output: "epath.Path", rows: Sequence[Row]) -> tuple["epath.Path", list[Row]]:
    """The folder to draw into, and the lines of the pictures that an earlier run has left there for the same request.

    Raises:
      UserError: if it cannot be written.
    """
    beside = output.parent / f".{output.name}.unfinished"
    try:
        done = read_rows(beside) if beside.is_dir() else []
        if done and same(done, rows[: len(done)]) and all((beside / row["file"]).exists() for row in done):
            write_rows(beside, done)  # without a line that was cut off
            return beside, done
        if beside.exists():
            beside.rmtree()
        beside.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"--output={output} cannot be written ({e.strerror}).") from e
    return beside, []


def write_rows(folder: "epath.Path", rows: Sequence[Row], more: bool = False) -> None:
    """Writes samples.jsonl, or more lines of it."""
    with (folder / ROWS_FILE).open("a" if more else "w") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def finish(folder: "epath.Path", output: "epath.Path") -> None:
    """Gives the finished folder its name.

    Raises:
      UserError: if it cannot be written.
    """
    try:
        if output.exists():
            output.rmtree()
        folder.rename(output)
    except OSError as e:
        raise UserError(f"--output={output} cannot be written ({e.strerror}).") from e


def npz(images: Sequence[np.ndarray], labels: Sequence[int | None]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of ADM's evaluation file: arr_0 uint8 [B, H, W, C], and arr_1 int64 [B] where all have a class."""
    yield "arr_0", np.stack(list(images))
    if all(label is not None for label in labels):
        yield "arr_1", np.asarray(labels, np.int64)
