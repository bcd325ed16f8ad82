"""The sampling binary's folder of images: written as they are made, taken up again where a run was cut short.

Images grow in `.NAME.unfinished` beside the folder, each with its line in `samples.jsonl`; the finished folder takes
its name at the end.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from imagegpt_jax import images
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import metadata
from imagegpt_jax.generation.prompts import file_name, title
from imagegpt_jax.generation.request import GenerationRequest
from imagegpt_jax.runtime import filesystem

if TYPE_CHECKING:
    from etils import epath
    from jax.sharding import Mesh

    from imagegpt_jax.generation.pipeline import Pipeline
    from imagegpt_jax.generation.results import GeneratedImages

ROWS_FILE, GRID_FILE, GIF_FILE, NPZ_FILE = "samples.jsonl", "grid.png", "samples.gif", "samples.npz"
OVERVIEWS = {GRID_FILE, GIF_FILE, NPZ_FILE}
MAX_GRID_TILES, MAX_TILE_IMAGES = 100, 16
MAX_GIF_IMAGES = 16
Row = dict[str, Any]


def plan(request: GenerationRequest, pipeline: "Pipeline") -> list[Row]:
    """The line of samples.jsonl of every image of a request with every setting: everything that decides it."""
    texts, labels = request.entries
    made_by = pipeline.about
    if request.best_of is not None:
        made_by = made_by | {"best_of": request.best_of, "scorer": request.scorer}
    rows = []
    for number, i in enumerate(request.indices()):
        entry = number // request.num_images
        text, label = texts[entry], labels[entry]
        rows.append(
            {
                "file": file_name(number, title(text, label)),
                "index": number,
                "prompt": text,
                "class": None if label is None else pipeline.decoder.class_index(label),
                "seed": request.seed,
                "sampler": dict(request.settings),
                "request": request.single(entry, i).to_json(),
                **made_by,
            }
        )
    return rows


def check_output(output: "epath.Path", rows: Sequence[Row] | None, overwrite: bool) -> bool:
    """Checks before any work that the folder may be written; True if it already holds these very samples.

    `rows` are the lines that its samples.jsonl would have, None before they are known; with `overwrite` other samples
    may be replaced. Raises UserError if it holds other samples, or files that are none.
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
                rows.append(metadata.renewed(json.loads(line)))
    return rows


def same(held: Sequence[Row], planned: Sequence[Row]) -> bool:
    """Whether lines are those planned, but for what is known only when an image has been made."""
    plain = json.loads(json.dumps(list(planned)))
    return [_planned(row) for row in held] == [_planned(row) for row in plain]


def _planned(row: Row) -> Row:
    kept = {name: value for name, value in row.items() if name != "results"}
    if "best_of" in row:  # which of the samples is kept is known afterwards
        kept["request"] = {name: value for name, value in row["request"].items() if name != "sample_indices"}
    return kept


def start(output: "epath.Path", rows: Sequence[Row]) -> tuple["epath.Path", list[Row]]:
    """The folder to write into, and the lines of the images that an earlier run has left there for the same request.

    Raises UserError if it cannot be written.
    """
    beside = output.parent / f".{output.name}.unfinished"
    with filesystem.writing(output):
        done = read_rows(beside) if beside.is_dir() else []
        if done and same(done, rows[: len(done)]) and all((beside / row["file"]).exists() for row in done):
            write_rows(beside, done)  # without a line that was cut off
            return beside, done
        if beside.exists():
            beside.rmtree()
        beside.mkdir(parents=True)
    return beside, []


def write_rows(folder: "epath.Path", rows: Sequence[Row], more: bool = False) -> None:
    """Writes samples.jsonl, or more lines of it."""
    with (folder / ROWS_FILE).open("a" if more else "w") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def local_mesh(tensor: int = 1) -> "Mesh | None":
    """All devices of this process, `tensor` of which share heads and matrices; None for a single device."""
    import jax

    from imagegpt_jax.parallel import sharding

    return sharding.local_mesh(tensor=tensor) if len(jax.local_devices()) > 1 else None


def write_images(parts: Iterator["GeneratedImages"], rows: Sequence[Row], folder: "epath.Path", first: int) -> None:
    """Writes images, from number `first` on, as they are made, each with its line of `plan`."""
    from imagegpt_jax.runtime import progress

    with progress.bar(total=len(rows), initial=first, desc="sample", unit="image") as bar:
        for part in parts:
            every = zip(part.numbers, part.sample_indices, part.pixels, part.results, strict=True)
            for number, i, pixels, results in every:
                row = rows[number] | {"results": results}
                row["request"] = row["request"] | {"sample_indices": [int(i)]}  # of the best of several it is new
                (folder / row["file"]).write_bytes(images.png_bytes(pixels, row))
                write_rows(folder, [row], more=True)
                bar.update()


def overviews(request: GenerationRequest, folder: "epath.Path", grid: tuple[int, int], gif: bool, npz: bool) -> None:
    """Writes grid.png from the images in the folder; if asked for, samples.gif and, for ADM's evaluation, samples.npz.

    In samples.gif they fill code by code; `grid` is the rows and columns of those.
    """
    rows, each = read_rows(folder), request.num_images

    def read(row: Row) -> np.ndarray:
        with Image.open(io.BytesIO((folder / row["file"]).read_bytes())) as png:
            array = np.asarray(png)
        return array.reshape(*array.shape[:2], -1)

    tiles = []
    for i, (text, label) in enumerate(list(zip(*request.entries, strict=True))[:MAX_GRID_TILES]):
        shown = rows[i * each : i * each + min(each, MAX_TILE_IMAGES)]
        if shown:
            tiles.append(images.Tile(title(text, label), [read(row) for row in shown]))
    kept = ("seed", "sampler", "decoder", "step", "decoder_hash", "tokenizer", "tokenizer_hash", "version")
    (folder / GRID_FILE).write_bytes(images.png_bytes(images.grid(tiles), {key: rows[0][key] for key in kept}))
    if gif:
        series = [images.filling(read(row), grid) for row in rows[:MAX_GIF_IMAGES]]
        frames = [images.grid([images.Tile("", list(step))]) for step in zip(*series, strict=True)]
        (folder / GIF_FILE).write_bytes(images.gif_bytes(frames))
    if npz:
        labels = [row["class"] for row in rows]
        arrays: dict[str, Any] = {"arr_0": np.stack([read(row) for row in rows])}
        if None not in labels:
            arrays["arr_1"] = np.asarray(labels, np.int64)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        (folder / NPZ_FILE).write_bytes(buffer.getvalue())


def write_captions(
    pipeline: "Pipeline", request: GenerationRequest, folder: "epath.Path"
) -> list[tuple[str, list[str]]]:
    """Describes pictures: captions.jsonl and a captioned grid.png; (path, captions) of each."""
    texts, each = pipeline.captions(request), request.num_images
    captions = [(image.path, texts[i * each : (i + 1) * each]) for i, image in enumerate(request.images)]
    decoder = pipeline.decoder
    made_by = {"seed": request.seed, "decoder": decoder.path, "step": decoder.step}
    made_by["decoder_hash"] = decoder.fingerprint()
    write_rows(folder, [{"image": path, "captions": words} | made_by for path, words in captions])
    pictures = pipeline.sources(request)
    tiles = [images.Tile(" / ".join(words), [pixels]) for (_, words), pixels in zip(captions, pictures, strict=True)]
    (folder / GRID_FILE).write_bytes(images.png_bytes(images.grid(tiles), made_by))
    return captions


def finish(folder: "epath.Path", output: "epath.Path") -> None:
    """Gives the finished folder its name. Raises UserError if it cannot be written."""
    with filesystem.writing(output):
        if output.exists():
            output.rmtree()
        folder.rename(output)
