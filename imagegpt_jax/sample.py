"""Draws pictures with a trained decoder: from words, classes, nothing, pictures, or parts of pictures.

Writes one PNG per picture, which carries prompt, seed, sampler and the hash of the checkpoint in its metadata, a
captioned grid.png, and samples.jsonl with one line per picture. The same command gives the same pictures, and goes on
where it was cut short.

  python -m imagegpt_jax.sample --decoder=runs/decoder --prompt="noto emoji of red heart" --output=samples
  python -m imagegpt_jax.sample --decoder=runs/decoder --prompts_file=prompts.txt --num_images=4 --seed=1 \\
      --cfg_scale=5 --top_k=200 --output=samples
  python -m imagegpt_jax.sample --decoder=runs/imagenet --class=golden_retriever --class=88 --output=samples
  python -m imagegpt_jax.sample --decoder=runs/decoder --inpaint=cat.png --mask=mask.png --prompt=hat --output=samples
  python -m imagegpt_jax.sample --decoder=runs/decoder --caption=cat.png --output=captions
  python -m imagegpt_jax.sample --from_image=samples/00000-red-heart.png --output=again
"""

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from imagegpt_jax import cli, errors
from imagegpt_jax.generation import flags as asking
from imagegpt_jax.generation import output, postprocess
from imagegpt_jax.generation.prompts import Request, file_name
from imagegpt_jax.sampling.settings import RENAMED, SCHEDULES, WEIGHTS, Sampling

flags.adopt_module_key_flags(asking)
flags.adopt_module_key_flags(postprocess)

if TYPE_CHECKING:
    from etils import epath

    from imagegpt_jax.generation import pipeline
    from imagegpt_jax.inference.loading import Decoder, Tokenizer

DECODER = flags.DEFINE_string("decoder", None, "Workdir of a trained decoder.")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "Workdir of the image tokenizer; by default the one that the decoder was trained with."
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint of the decoder; by default the newest.", lower_bound=0)
FROM_IMAGE = flags.DEFINE_string(
    "from_image", "", "Draw this picture of an earlier run again, from its metadata alone."
)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write the pictures into.", required=True)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace samples that the output folder already holds.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures of each prompt or class.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Picture i depends on the seed and i alone.", lower_bound=0)
BEST_OF = flags.DEFINE_integer("best_of", None, "Draw so many of each prompt and keep the best --num_images.", 1)
BEAMS = flags.DEFINE_integer(
    "beams", 0, "For --caption: search for the likeliest captions with so many beams; 0 = draw them.", lower_bound=0
)
SCORER = flags.DEFINE_string(
    "scorer",
    "likelihood",
    "For --best_of: likelihood, caption, words, clip:FOLDER, or module:function (see generation/scorers.py).",
)
TENSOR = flags.DEFINE_integer(
    "tensor", 1, "Cut heads and matrices over so many devices; pictures are shared out among the rest.", lower_bound=1
)
GIF = flags.DEFINE_bool("gif", False, "Also write samples.gif, the first pictures filling code by code.")
NPZ = flags.DEFINE_bool("npz", False, "Also write samples.npz, all pictures as ADM's evaluation takes them.")

# --- Settings of `Sampling`; by default those of the decoder's config.
DEFAULT = "; by default the decoder's own."
SETTINGS = (
    flags.DEFINE_float("temperature", None, "Sampling temperature, 0 takes the likeliest code" + DEFAULT),
    flags.DEFINE_integer("top_k", None, "Draw among the k likeliest codes, 0 = all" + DEFAULT),
    flags.DEFINE_float("top_p", None, "Draw among the likeliest codes of this total probability, 1 = all" + DEFAULT),
    flags.DEFINE_float("min_p", None, "Draw among codes at least this share as likely as the likeliest" + DEFAULT),
    flags.DEFINE_integer("no_repeat_ngram_size", None, "No n-gram of so many codes appears twice, 0 = off" + DEFAULT),
    flags.DEFINE_float("cfg_scale", None, "Strength of classifier-free guidance, 1 = none" + DEFAULT),
    flags.DEFINE_enum("cfg_schedule", None, SCHEDULES, "How guidance changes from code to code" + DEFAULT),
    flags.DEFINE_float("cfg_power", None, "Exponent of power_cosine" + DEFAULT),
    flags.DEFINE_float("cfg_start", None, "Share of the codes at which interval begins to guide" + DEFAULT),
    flags.DEFINE_float("cfg_end", None, "Share of the codes at which interval ends" + DEFAULT),
    flags.DEFINE_enum("weights", None, WEIGHTS[1:], "Precision of the weights while drawing" + DEFAULT),
    flags.DEFINE_integer(
        "speculative", None, "Guesses that go through the network at once; the distribution stays, 0 = off" + DEFAULT
    ),
    flags.DEFINE_integer(
        "tokens_per_step", None, "Codes of one forward pass, for decoders trained in random order" + DEFAULT
    ),
)
for _old, _new in RENAMED.items():
    flags.DEFINE_alias(_old, _new)

MAX_GRID_TILES, MAX_TILE_IMAGES = 100, 16
MAX_GIF_IMAGES = 16


def plan(
    decoder: "Decoder", asked: Sequence[Request], sampling: Sampling, tok: "Tokenizer", only: int | None, draw: int
) -> list[output.Row]:
    """The line of samples.jsonl of every picture: everything that decides it.

    Args:
      decoder: that draws.
      asked: requests.
      sampling: how.
      tok: its image tokenizer.
      only: the one request that is to be drawn, for --from_image.
      draw: the number of its draws.
    """
    about = output.about(decoder, tok, sampling, SEED.value) | {"finish": postprocess.remembered()}
    if BEST_OF.value is not None:
        about |= {"best_of": BEST_OF.value, "scorer": SCORER.value}
    rows = []
    for number, request in enumerate(asked):
        if only not in (None, number):
            continue
        kept = asking.remembered(number, request)
        for i in range(NUM_IMAGES.value):
            own = i if asking.INTERPOLATE.value else number * NUM_IMAGES.value + i
            rows.append(
                {
                    "file": file_name(len(rows), request.caption),
                    "index": len(rows),
                    "prompt": request.text,
                    "class": None if request.label is None else decoder.class_index(request.label),
                    "request": kept,
                    "draw": own if only is None else draw,
                    **about,
                }
            )
    return rows


def adopt(path: str) -> tuple[dict[str, Any], int]:
    """Sets the flags that a picture's metadata name; returns the metadata and which request it shows.

    Raises:
      UserError: if it is no picture of this program.
    """
    from imagegpt_jax import images

    try:
        with open(path, "rb") as file:
            about = images.read_metadata(file.read())
    except (OSError, ValueError) as e:
        raise errors.UserError(
            f"--from_image={path} cannot be read ({e}): give a PNG that this program wrote."
        ) from None
    if "request" not in about:
        raise errors.UserError(f"--from_image={path} has no metadata of this program: give a PNG that it wrote.")
    for name, value in about["finish"].items():
        # A picture must not decide which code is run.
        if name in postprocess.PLUG_INS and ":" in value and flags.FLAGS[name].value != value:
            raise errors.UserError(
                f"--from_image={path} was made with --{name}={value}: give that flag if you trust it."
            )
    own = {flag.name: about[flag.name] for flag in (DECODER, TOKENIZER, STEP) if not flag.present}
    sampler = {RENAMED.get(name, name): value for name, value in about["sampler"].items()}
    for name, value in {**own, "seed": about["seed"], **sampler, **about["finish"]}.items():
        flags.FLAGS[name].value = value
    return about, asking.recall(about["request"])


# ----------------------------------------------------------------------------------------------------------- pictures


def draw_rows(
    decoder: "Decoder",
    tok: "Tokenizer",
    sampling: Sampling,
    sketch: "pipeline.Sketch",
    finish: postprocess.Finisher,
    rows: list[output.Row],
    folder: "epath.Path",
    done: list[output.Row],
) -> None:
    """Draws the pictures of `rows` that are not among `done`, and writes each with its line."""
    import jax
    from tqdm import tqdm

    from imagegpt_jax import images
    from imagegpt_jax.generation import pipeline
    from imagegpt_jax.parallel import sharding

    devices = jax.local_devices()
    mesh = sharding.local_mesh(devices, TENSOR.value) if len(devices) > 1 else None

    def write(row: output.Row, image: Any, found: dict[str, Any]) -> None:
        image, checked = finish(image, row["prompt"])
        row = row | {"found": found | checked}
        (folder / row["file"]).write_bytes(images.png_bytes(image, row))
        output.write_rows(folder, [row], more=True)
        bar.update()

    with tqdm(total=len(rows), initial=len(done), desc="sample", unit="image", mininterval=0.5) as bar:
        if BEST_OF.value is not None:
            kept = pipeline.best(
                decoder,
                tok,
                sketch,
                sampling,
                SEED.value,
                best_of=BEST_OF.value,
                num_images=NUM_IMAGES.value,
                scorer=SCORER.value,
                mesh=mesh,
            )
            for row, image, score, draw in list(zip(rows, *kept, strict=True))[len(done) :]:
                write(row | {"draw": int(draw)}, image, {"score": float(score)})
            return
        stream = pipeline.draw(
            decoder,
            tok,
            sketch,
            sampling,
            SEED.value,
            num_images=NUM_IMAGES.value,
            first=len(done),
            draws=[row["draw"] for row in rows],
            mesh=mesh,
        )
        waiting = iter(rows[len(done) :])
        for part in stream:
            for image, likelihood in zip(part.images, part.log_likelihood, strict=True):
                write(next(waiting), image, {"log_likelihood": float(likelihood)})


def overviews(asked: Sequence[Request], rows: Sequence[output.Row], folder: "epath.Path", grid: Any) -> None:
    """Writes grid.png, and what --gif and --npz ask for, from the pictures in the folder."""
    import numpy as np
    from PIL import Image

    from imagegpt_jax import images

    def read(row: output.Row) -> Any:
        with Image.open(io.BytesIO((folder / row["file"]).read_bytes())) as png:
            array = np.asarray(png)
        return array.reshape(*array.shape[:2], -1)

    each = NUM_IMAGES.value
    tiles = []
    for i, request in enumerate(asked[:MAX_GRID_TILES]):
        shown = rows[i * each : i * each + min(each, MAX_TILE_IMAGES)]
        if shown:
            tiles.append(images.Tile(request.caption, [read(row) for row in shown]))
    kept = ("seed", "sampler", "decoder", "step", "decoder_hash", "tokenizer", "tokenizer_hash", "version")
    about = {key: rows[0][key] for key in kept}
    (folder / output.GRID_FILE).write_bytes(images.png_bytes(images.grid(tiles), about))
    if GIF.value:
        series = [images.filling(read(row), grid) for row in rows[:MAX_GIF_IMAGES]]
        frames = [images.grid([images.Tile("", list(step))]) for step in zip(*series, strict=True)]
        (folder / output.GIF_FILE).write_bytes(images.gif_bytes(frames))
    if NPZ.value:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = dict(output.npz([read(row) for row in rows], [row["class"] for row in rows]))
        np.savez(buffer, **arrays)
        (folder / output.NPZ_FILE).write_bytes(buffer.getvalue())


def write_captions(decoder: "Decoder", tok: "Tokenizer", folder: "epath.Path") -> None:
    """Describes the pictures of --caption: captions.jsonl, a captioned grid.png, and one line for each on stdout."""
    from imagegpt_jax import images
    from imagegpt_jax.generation import functional

    paths = asking.CAPTION.value
    source = asking.pictures(paths, decoder, tok)
    settings = {flag.name: flag.value for flag in SETTINGS if flag.value is not None}
    texts = functional.caption(
        decoder, tok, source, num_captions=NUM_IMAGES.value, seed=SEED.value, beams=BEAMS.value, **settings
    )
    rows = [
        {"image": path, "captions": texts[i * NUM_IMAGES.value : (i + 1) * NUM_IMAGES.value]}
        for i, path in enumerate(paths)
    ]
    about = {"seed": SEED.value, "decoder": decoder.path, "step": decoder.step, "decoder_hash": decoder.fingerprint()}
    output.write_rows(folder, [row | about for row in rows])
    tiles = [images.Tile(" / ".join(row["captions"]), [image]) for row, image in zip(rows, source, strict=True)]
    (folder / output.GRID_FILE).write_bytes(images.png_bytes(images.grid(tiles), about))
    for row in rows:
        print("\t".join([row["image"], *row["captions"]]))


def main() -> None:
    """Draws what the flags describe."""
    about, only = adopt(FROM_IMAGE.value) if FROM_IMAGE.value else ({}, None)
    if not DECODER.value:
        raise errors.UserError(
            "say which decoder is to draw: --decoder=WORKDIR, or --from_image=PNG of an earlier run."
        )
    asked = asking.requests()

    from etils import epath

    from imagegpt_jax import config as config_lib

    where = epath.Path(OUTPUT.value)
    output.check_output(where, None, OVERWRITE.value)
    if asking.CAPTION.value and where.exists() and not OVERWRITE.value:
        raise errors.UserError(f"--output={where} is already there: give a new folder, or --overwrite.")
    for workdir in filter(None, (DECODER.value, TOKENIZER.value)):
        config_lib.load(workdir)  # a wrong folder should not cost the seconds that JAX takes to start

    from imagegpt_jax.generation import pipeline, scorers
    from imagegpt_jax.inference import loading

    # --- Everything a person can get wrong, before any picture.
    decoder = loading.load_decoder(DECODER.value, STEP.value, tokenizer=TOKENIZER.value or None)
    settings: dict[str, Any] = {flag.name: flag.value for flag in SETTINGS}
    sampling = decoder.sampling(**settings)
    tok = decoder.load_tokenizer()
    if asking.CAPTION.value:
        folder, _ = output.start(where, [])
        write_captions(decoder, tok, folder)
        output.finish(folder, where)
        return
    scorers.find(SCORER.value)
    rows = plan(decoder, asked, sampling, tok, only, about.get("draw", 0))
    for name in ("decoder_hash", "tokenizer_hash"):
        if about.get(name, rows[0][name]) != rows[0][name]:
            raise errors.UserError(
                f"{FROM_IMAGE.value} was drawn by another {name.removesuffix('_hash')} (hash {about[name]}, and this"
                f" one has {rows[0][name]}): give the --decoder, --step and --tokenizer that drew it."
            )
    if output.check_output(where, rows, OVERWRITE.value):
        print(f"These {len(rows)} pictures are already there: {where}", file=sys.stderr)
        return
    for request in asked:
        if len(decoder.encode_text(request.text)) > decoder.setup.layout.text_length:
            print(f"note: only the beginning of {request.text[:60]!r} fits the decoder's text length.", file=sys.stderr)

    finish = postprocess.Finisher()
    sketch = asking.sketch(asked, decoder, tok, SEED.value)
    sketch = sketch if only is None else sketch.take([only])
    grid = pipeline.layout_of(decoder, sketch.grid).grid

    # --- Pictures.
    folder, done = output.start(where, rows)
    if done:
        print(f"Going on after the {len(done)} pictures that are already there.", file=sys.stderr)
    draw_rows(decoder, tok, sampling, sketch, finish, rows, folder, done)
    overviews(asked if only is None else [asked[only]], output.read_rows(folder), folder, grid)
    output.finish(folder, where)
    left_out = len(asked) - MAX_GRID_TILES
    print(
        f"Drew {len(rows)} pictures: {where}; overview in {where / output.GRID_FILE}"
        + (f" (without the last {left_out} prompts)" if left_out > 0 else ""),
        file=sys.stderr,
    )


if __name__ == "__main__":
    cli.run(main)
