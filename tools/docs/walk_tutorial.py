"""Walks docs/tutorial.md as a newcomer would: makes 60 photos, runs the page's commands unchanged, checks the results.

Photos are of three formats and many shapes. Most JPEGs are stored turned, with the rotation in their Exif data, and
each photo has a blue sky above a green field: a picture that is not upright shows.

  python tools/docs/walk_tutorial.py --folder=/tmp/tutorial
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from imagegpt_jax import cli, errors

FOLDER = flags.DEFINE_string("folder", None, "Empty folder to work in.", required=True)

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
PHOTOS, RES = 60, 32
SHAPES = ("circle", "square", "stripe")
COLOURS = {"red": (220, 40, 30), "yellow": (240, 210, 40), "white": (250, 250, 250), "black": (20, 20, 20)}
SKY, FIELD = (90, 150, 230), (50, 130, 50)
# Exif orientation -> how the upright picture is stored (Exif 2.3, tag 0x0112).
STORED = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
ORIENTATION = 0x0112


def photo(number: int) -> tuple[Image.Image, str, str]:
    """(upright picture, its shape's name, its caption)."""
    width, height = ((96, 64), (64, 96), (80, 80), (120, 70))[number % 4]
    shape, colour = SHAPES[number % 3], list(COLOURS)[number // 3 % len(COLOURS)]
    image = Image.new("RGB", (width, height), SKY)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height // 2, width, height), fill=FIELD)
    x, y, r = width // 2 + number % 7 - 3, height // 2, 10
    box = (0, y - 5, width, y + 5) if shape == "stripe" else (x - r, y - r, x + r, y + r)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLOURS[colour])
    return image, shape, f"a {colour} {shape} over a green field"


def make_photos(folder: pathlib.Path, count: int = PHOTOS) -> None:
    """`photos/` with captions in metadata.jsonl, and the same photos in `classes/`, a sub-folder for each shape."""
    (folder / "photos").mkdir(parents=True)
    rows = []
    for number in range(count):
        image, shape, caption = photo(number)
        form = ("jpg", "png", "webp", "jpg")[number % 4]
        orientation = (1, 3, 6, 8)[number // 4 % 4] if form == "jpg" else 1
        exif, turn = Image.Exif(), STORED[orientation]
        exif[ORIENTATION] = orientation
        stored = image if turn is None else image.transpose(turn)
        name = f"img{number:02d}.{form}"
        (folder / "classes" / shape).mkdir(parents=True, exist_ok=True)
        for path in (folder / "photos" / name, folder / "classes" / shape / name):
            stored.save(path, quality=95, exif=exif if form == "jpg" else Image.Exif())
        rows.append({"file_name": name, "text": caption})
    (folder / "photos" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def commands(page: pathlib.Path = PAGE) -> list[str]:
    """The page's commands, in order, as they stand there."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in re.split(r"(?<!\\)\n", block) if line.strip()]


def is_upright(image_HWC: np.ndarray) -> bool:
    """Whether the sky is above and the field below."""
    above, below = (part.reshape(-1, 3).astype(float).mean(0) for part in np.split(image_HWC[:, :, :3], 2))
    return bool(above[2] > above[1] and below[1] > below[2])


def tiles(path: pathlib.Path, side: int = RES) -> np.ndarray:
    """The pictures of a sheet, uint8 [rows, columns, side, side, 3]."""
    sheet_HWC = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = sheet_HWC.shape[0] // side, sheet_HWC.shape[1] // side
    return sheet_HWC.reshape(rows, side, columns, side, 3).swapaxes(1, 2)


def check_data(folder: pathlib.Path) -> Iterator[str]:
    """What is wrong with the data of the runs in a folder."""
    from imagegpt_jax.data import sources

    os.chdir(folder)
    for run in ("tokenizer", "decoder", "classes"):
        data = json.loads((folder / "runs" / run / "config.json").read_text())["data"]
        opened = [sources.open_source(data[split]) for split in ("train", "validation")]
        train, validation = ({r["id"] for r in s.__getitems__(range(len(s)))} for s in opened)
        if train & validation or not validation:
            yield f"{run}: {len(train & validation)} photos are in both splits, of {len(validation)} in validation"
        if (count := len(train | validation)) != sum(file.suffix != ".jsonl" for file in folder.glob("photos/*")):
            yield f"{run}: {count} photos were read"
    if (labels := json.loads((folder / "runs" / "classes" / "labels.json").read_text())) != list(SHAPES):
        yield f"classes: labels.json has {labels}"


def check_pictures(folder: pathlib.Path) -> Iterator[str]:
    """What is wrong with the pictures in a folder where the commands have run."""
    inputs, reconstructions = tiles(folder / "runs" / "reconstructions.png")
    for what, images in (("inputs", inputs), ("reconstructions", reconstructions)):
        if turned := [i for i, image in enumerate(images) if not is_upright(image)]:
            yield f"{what} {turned} are not upright"
    for name, count in (("samples", 4), ("class_samples", 4)):
        drawn = [path for path in sorted((folder / name).glob("*.png")) if path.name != "grid.png"]
        sizes = {Image.open(path).convert("RGB").size for path in drawn}
        if len(drawn) != count or sizes != {(RES, RES)}:
            yield f"{name}/ has {len(drawn)} pictures of {sizes}"
        Image.open(folder / name / "grid.png").load()


def main() -> None:
    """Makes the photos, runs the commands, checks the results.

    Raises:
      UserError: if a command fails, or a result is not what it should be.
    """
    folder = pathlib.Path(FOLDER.value).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise errors.UserError(f"{folder} is not empty: give another --folder.")
    make_photos(folder)
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])
    packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for command in commands():
        print(f"$ {command}", flush=True)
        environment = {**os.environ, "PATH": path, "PYTHONPATH": packages}
        if code := subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=False).returncode:
            raise errors.UserError(f"a command of {PAGE} ended with status {code}: see its last words above.")
    if wrong := [*check_data(folder), *check_pictures(folder)]:
        raise errors.UserError(f"the tutorial does not give what it says: {'; '.join(wrong)}.")
    print(f"{len(commands())} commands, all as they should be: {folder}")


if __name__ == "__main__":
    cli.run(main)
