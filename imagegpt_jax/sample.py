"""Draws pictures with a trained decoder, from words, classes or nothing.

Writes one PNG per picture, which carries prompt, seed, sampler and checkpoint in its metadata, a captioned grid.png,
and samples.jsonl with one line per picture. The same command gives the same pictures.

  python -m imagegpt_jax.sample --decoder=runs/decoder --prompt="noto emoji of red heart" --output=samples
  python -m imagegpt_jax.sample --decoder=runs/decoder --prompts_file=prompts.txt --num_images=4 --seed=1 \\
      --cfg_scale=5 --top_k=200 --output=samples
  python -m imagegpt_jax.sample --decoder=runs/imagenet --class=golden_retriever --class=88 --output=samples
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from imagegpt_jax import cli

if TYPE_CHECKING:
    from etils import epath

    from imagegpt_jax.api import Decoder

DECODER = flags.DEFINE_string("decoder", None, "Workdir of a trained decoder.", required=True)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "Workdir of the image tokenizer; by default the one that the decoder was trained with."
)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write the pictures into.", required=True)
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; give it several times for several prompts.")
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", "", "Text file (UTF-8) with one prompt a line; blank lines and lines beginning with # are skipped."
)
CLASS = flags.DEFINE_multi_string("class", [], "Class to draw, by name or number; may be given several times.")
UNCONDITIONAL = flags.DEFINE_bool("unconditional", False, "Also draw without any prompt.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures of each prompt or class.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Picture i depends on the seed and i alone.", lower_bound=0)
TEMPERATURE = flags.DEFINE_float("temperature", None, "Sampling temperature; by default the decoder's own setting.")
TOP_K = flags.DEFINE_integer("top_k", None, "Draw among the k likeliest codes, 0 = all; by default the decoder's own.")
TOP_P = flags.DEFINE_float(
    "top_p", None, "Draw among the likeliest codes of this total probability, 1 = all; by default the decoder's own."
)
CFG_SCALE = flags.DEFINE_float(
    "cfg_scale", None, "Strength of classifier-free guidance, 1 = none; by default the decoder's own."
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint of the decoder; by default the newest.", lower_bound=0)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace samples that the output folder already holds.")

MAX_PROMPT = 2000  # characters; a longer line is not a prompt
MAX_GRID_TILES, MAX_TILE_IMAGES = 100, 16
ROWS_FILE, GRID_FILE = "samples.jsonl", "grid.png"


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
        raise cli.UserError(f"{where} has {len(text)} characters: a prompt has at most {MAX_PROMPT}.")
    if any(unicodedata.category(c) == "Cs" or c == "\0" for c in text):
        raise cli.UserError(f"{where} is not text: prompts are UTF-8.")
    return text.strip()


def read_prompts(path: str) -> list[str]:
    """Reads a prompts file.

    Raises:
      UserError: if it cannot be read, has a line that is not UTF-8 or too long (naming the line), or has no prompt.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as e:
        raise cli.UserError(f"--prompts_file={path} cannot be read ({e.strerror}): give a text file.") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise cli.UserError(f"line {number} of {path} is not UTF-8 text: save the file as UTF-8.") from None
        text = check_prompt(text.rstrip("\r"), f"line {number} of {path}")
        if text and not text.startswith("#"):
            prompts.append(text)
    if not prompts:
        raise cli.UserError(f"{path} has no prompts: write one on each line.")
    return prompts


def requests() -> list[Request]:
    """What the flags ask for, in the order prompts, file, classes, nothing."""
    found = [Request(check_prompt(text, f"--prompt number {i}")) for i, text in enumerate(PROMPT.value, start=1)]
    if PROMPTS_FILE.value:
        found += [Request(text) for text in read_prompts(PROMPTS_FILE.value)]
    found += [Request(label=label) for label in CLASS.value]
    if UNCONDITIONAL.value:
        found.append(Request())
    if not found:
        raise cli.UserError("nothing to draw: give --prompt, --prompts_file, --class or --unconditional.")
    return found


def file_name(index: int, caption: str) -> str:
    """A file name that is safe anywhere, such as "00003-a-red-bicycle.png"."""
    ascii_text = unicodedata.normalize("NFKD", caption).encode("ascii", "ignore").decode().lower()
    slug = "-".join(re.findall(r"[a-z0-9]+", ascii_text))[:48].strip("-")
    return f"{index:05d}{'-' if slug else ''}{slug}.png"


def plan(
    decoder: "Decoder", asked: Sequence[Request], sampler: dict[str, Any], tokenizer: tuple[str, int]
) -> list[Any]:
    """The line of samples.jsonl of every picture: everything that decides it."""
    rows = []
    for request in asked:
        for _ in range(NUM_IMAGES.value):
            rows.append(
                {
                    "file": file_name(len(rows), request.caption),
                    "index": len(rows),
                    "prompt": request.text,
                    "class": None if request.label is None else decoder.class_index(request.label),
                    "seed": SEED.value,
                    "sampler": sampler,
                    "decoder": DECODER.value,
                    "step": decoder.step,
                    "tokenizer": tokenizer[0],
                    "tokenizer_step": tokenizer[1],
                    "version": importlib.metadata.version("imagegpt_jax"),
                }
            )
    return rows


# ------------------------------------------------------------------------------------------------------ output folder


def check_output(output: "epath.Path", rows: Sequence[Any] | None, overwrite: bool) -> bool:
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
        raise cli.UserError(f"--output={output} is a file: give a folder.")
    names = {path.name for path in output.iterdir()}
    if not names:
        return False
    held = []
    if ROWS_FILE in names:
        with contextlib.suppress(ValueError):
            held = [json.loads(line) for line in (output / ROWS_FILE).read_text().splitlines()]
    foreign = names - {ROWS_FILE, GRID_FILE} - {row.get("file") for row in held}
    if not held or foreign:
        raise cli.UserError(f"--output={output} holds other files ({min(foreign or names)}): give a new folder.")
    if rows is None or overwrite:
        return False
    if held == json.loads(json.dumps(rows)) and all(row["file"] in names for row in rows) and GRID_FILE in names:
        return True
    raise cli.UserError(f"--output={output} already holds other samples: give another folder, or --overwrite.")


@contextlib.contextmanager
def new_folder(output: "epath.Path"):
    """A folder beside `output` that takes its place at the end, and is removed if anything goes wrong before."""
    beside = output.parent / f".{output.name}.unfinished"
    if beside.exists():
        beside.rmtree()
    try:
        beside.mkdir(parents=True)
        yield beside
        if output.exists():
            output.rmtree()
        beside.rename(output)
    except OSError as e:
        raise cli.UserError(f"--output={output} cannot be written ({e.strerror}).") from e
    finally:
        if beside.exists():
            beside.rmtree()


# --------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Draws what the flags describe."""
    asked = requests()

    from etils import epath

    from imagegpt_jax import config as config_lib

    output = epath.Path(OUTPUT.value)
    check_output(output, None, OVERWRITE.value)
    for workdir in filter(None, (DECODER.value, TOKENIZER.value)):
        config_lib.load(workdir)  # a wrong folder should not cost the seconds that JAX takes to start

    from tqdm import tqdm

    from imagegpt_jax import api, images

    # --- Everything a person can get wrong, before any picture.
    decoder = api.load_decoder(DECODER.value, STEP.value, tokenizer=TOKENIZER.value or None)
    settings = {flag.name: flag.value for flag in (TEMPERATURE, TOP_K, TOP_P, CFG_SCALE) if flag.value is not None}
    sampling = decoder.sampling(**settings)
    tok = decoder.load_tokenizer()
    rows = plan(decoder, asked, dataclasses.asdict(sampling), (tok.path, tok.step))
    if check_output(output, rows, OVERWRITE.value):
        print(f"These {len(rows)} pictures are already there: {output}", file=sys.stderr)
        return
    for request in asked:
        if len(decoder.encode_text(request.text)) > decoder.setup.layout.text_length:
            print(f"note: only the beginning of {request.text[:60]!r} fits the decoder's text length.", file=sys.stderr)

    # --- Pictures.
    drawn = []
    shown = MAX_GRID_TILES * NUM_IMAGES.value
    with new_folder(output) as folder, tqdm(total=len(rows), desc="sample", unit="image", mininterval=0.5) as bar:
        stream = api.generate_tiles(
            decoder,
            tok,
            [request.text for request in asked],
            classes=[request.label for request in asked],
            seed=SEED.value,
            sampling=sampling,
            num_images=NUM_IMAGES.value,
        )
        for row, image in zip(rows, itertools.chain.from_iterable(stream), strict=True):
            (folder / row["file"]).write_bytes(images.png_bytes(image, row))
            if row["index"] < shown:
                drawn.append(image)
            bar.update()
        (folder / ROWS_FILE).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

        # --- Grid.
        each = NUM_IMAGES.value
        tiles = [
            images.Tile(request.caption, drawn[i * each : i * each + min(each, MAX_TILE_IMAGES)])
            for i, request in enumerate(asked[:MAX_GRID_TILES])
        ]
        about = {key: rows[0][key] for key in ("seed", "sampler", "decoder", "step", "tokenizer", "version")}
        (folder / GRID_FILE).write_bytes(images.png_bytes(images.grid(tiles), about))
    left_out = len(asked) - MAX_GRID_TILES
    print(
        f"Drew {len(rows)} pictures: {output}; overview in {output / GRID_FILE}"
        + (f" (without the last {left_out} prompts)" if left_out > 0 else ""),
        file=sys.stderr,
    )


if __name__ == "__main__":
    cli.run(main)
