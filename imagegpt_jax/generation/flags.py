"""The flags of the sampling binary that say what to draw, and the sketches they ask for.

A picture's metadata keep the flags that it alone depends on, so that `--from_image` can set them again.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from imagegpt_jax.errors import UserError
from imagegpt_jax.generation.prompts import Request, check_prompt, read_prompts

if TYPE_CHECKING:
    from imagegpt_jax.generation.pipeline import Sketch
    from imagegpt_jax.inference.loading import Decoder, Tokenizer

PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; give it several times for several prompts.")
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    "",
    "File of prompts (UTF-8): one a line, where blank lines and lines beginning with # are skipped, or a .csv or .tsv"
    " with a header, such as PartiPrompts'.",
)
PROMPT_COLUMN = flags.DEFINE_string(
    "prompt_column", "", "Column of a .csv or .tsv; by default prompt, caption or text, whichever it has."
)
CLASS = flags.DEFINE_multi_string("class", [], "Class to draw, by name or number; may be given several times.")
UNCONDITIONAL = flags.DEFINE_bool("unconditional", False, "Also draw without any prompt.")
NEGATIVE = flags.DEFINE_string("negative", "", "What guidance leads away from; by default nothing in particular.")
GRID = flags.DEFINE_list(
    "grid",
    [],
    "Rows and columns of codes, such as 8,12, for pictures of another shape than the decoder was trained on.",
)
CAPTION = flags.DEFINE_multi_string("caption", [], "Picture to describe in words; may be given several times.")
INPAINT = flags.DEFINE_multi_string("inpaint", [], "Picture of which to draw anew what --mask shows.")
MASK = flags.DEFINE_string("mask", "", "For --inpaint: a picture, light where new pixels go.")
OUTPAINT = flags.DEFINE_multi_string("outpaint", [], "Picture around which to draw --margins.")
MARGINS = flags.DEFINE_list("margins", [], "For --outpaint: pixels at top,right,bottom,left, after resizing.")
COMPLETE = flags.DEFINE_multi_string("complete", [], "Picture of which to keep the upper part and draw the rest.")
KEEP = flags.DEFINE_float("keep", 0.5, "For --complete: how much of the height to keep, 0 to 1.")
VARIATIONS = flags.DEFINE_multi_string("variations", [], "Picture of which to draw a random share of the codes anew.")
EDIT = flags.DEFINE_multi_string("edit", [], "Picture to draw anew under --prompt, in --region or by --strength.")
REGION = flags.DEFINE_list("region", [], "For --edit: top,left,height,width in pixels, after resizing; the rest stays.")
STRENGTH = flags.DEFINE_float(
    "strength",
    None,
    "Share of the codes drawn anew, 0 to 1; by default 0.5 for --variations and --edit, 1 for --style_transfer.",
)
STYLE_TRANSFER = flags.DEFINE_multi_string(
    "style_transfer", [], "Picture to draw in --style; --prompt is its caption, else the decoder writes one."
)
STYLE = flags.DEFINE_string("style", "", "For --style_transfer: name of the wanted style, such as twemoji.")
SOURCE_STYLE = flags.DEFINE_string("source_style", "", "For --style_transfer: name of the style it has in its caption.")
INTERPOLATE = flags.DEFINE_string("interpolate", "", "Draw a series from --prompt to this prompt.")
FRAMES = flags.DEFINE_integer("frames", 8, "For --interpolate: pictures of the series.", lower_bound=2)

OF_PICTURES = ("inpaint", "outpaint", "complete", "variations", "edit", "style_transfer")
TASKS = ("caption", *OF_PICTURES, "interpolate")
# What a task needs beside its picture, and what of it may be given.
NEEDS = {"inpaint": (MASK,), "outpaint": (MARGINS,), "style_transfer": (STYLE, SOURCE_STYLE)}
USES = {
    "inpaint": (MASK,),
    "outpaint": (MARGINS,),
    "complete": (KEEP,),
    "variations": (STRENGTH,),
    "edit": (REGION, STRENGTH),
    "style_transfer": (STYLE, SOURCE_STYLE, STRENGTH),
    "interpolate": (FRAMES,),
}


def _value(name: str) -> Any:
    return flags.FLAGS[name].value


def task() -> str:
    """The name of the task, "" for pictures from words.

    Raises:
      UserError: for two tasks at once, or a task without what it needs.
    """
    asked = [name for name in TASKS if _value(name)]
    if not asked:
        return ""
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two tasks: run them one after the other.")
    for needed in NEEDS.get(asked[0], ()):
        if not needed.value:
            raise UserError(f"--{asked[0]} needs --{needed.name}: {flags.FLAGS[needed.name].help}")
    if asked[0] == "edit" and not PROMPT.value:
        raise UserError("--edit needs --prompt: what the picture is to show.")
    if asked[0] == "interpolate" and len(PROMPT.value) != 1:
        raise UserError("--interpolate needs one --prompt to begin with.")
    return asked[0]


def requests() -> list[Request]:
    """What is asked for: prompts, file, classes, nothing, in this order; for pictures one request each.

    Raises:
      UserError: for prompts that cannot be read, or nothing to draw.
    """
    found = [Request(check_prompt(text, f"--prompt number {i}")) for i, text in enumerate(PROMPT.value, start=1)]
    if PROMPTS_FILE.value:
        found += [Request(text) for text in read_prompts(PROMPTS_FILE.value, PROMPT_COLUMN.value)]
    found += [Request(label=label) for label in CLASS.value]
    if UNCONDITIONAL.value:
        found.append(Request())
    name = task()
    if name in OF_PICTURES:
        count = len(_value(name))
        found = found * count if len(found) == 1 else found or [Request()] * count
        if len(found) != count:
            raise UserError(f"there are {len(found)} prompts for {count} pictures: give one for all, or one for each.")
    if name == "interpolate":
        check_prompt(INTERPOLATE.value, "--interpolate")
        found *= FRAMES.value
    if not found and name != "caption":
        raise UserError("nothing to draw: give --prompt, --prompts_file, --class or --unconditional.")
    return found


def digest(path: str) -> str:
    """16 hexadecimal digits of a file's SHA-256.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): give a picture.") from None


def remembered(number: int, request: Request) -> dict[str, Any]:
    """The flags that request `number` depends on, for a picture's metadata; of files also their digests."""
    kept: dict[str, Any] = {"prompt": [request.text] if request.text else []}
    if request.label is not None:
        kept["class"] = [request.label]
    for flag in (NEGATIVE, GRID):
        if flag.value:
            kept[flag.name] = flag.value
    name = task()
    if name:
        kept |= {used.name: used.value for used in USES.get(name, ()) if used.value not in (None, "", [])}
    if name == "interpolate":
        kept |= {name: INTERPOLATE.value, "frame": number}
    if name in OF_PICTURES:
        path = _value(name)[number]
        files = [path, MASK.value] if name == "inpaint" else [path]
        kept |= {name: [path], "files": {path: digest(path) for path in files}}
    return kept


def recall(kept: dict[str, Any]) -> int:
    """Sets the flags of `remembered` again; returns which request of those that they ask for is meant.

    Raises:
      UserError: if a file has changed since.
    """
    for path, wanted in kept.get("files", {}).items():
        if digest(path) != wanted:
            raise UserError(f"{path} is not the file that the picture was made from: its contents have changed.")
    for name, value in kept.items():
        if name not in ("files", "frame"):
            flags.FLAGS[name].value = value
    if not kept.keys() & {"class", *TASKS} and not kept["prompt"]:
        flags.FLAGS["unconditional"].value = True
    return kept.get("frame", 0)


def numbers(flag: Any, count: int) -> tuple[int, ...]:
    """A list flag as whole numbers.

    Raises:
      UserError: if it is none, or of another length.
    """
    try:
        found = tuple(int(part) for part in flag.value)
    except ValueError:
        found = ()
    if len(found) != count:
        raise UserError(f"--{flag.name}={','.join(flag.value)} must be {count} whole numbers with commas between.")
    return found


def pictures(paths: list[str], gpt: "Decoder", tok: "Tokenizer") -> Any:
    """Pictures from files, of the decoder's size: uint8 [B, H, W, 3].

    Raises:
      UserError: for a file that is no picture.
    """
    import numpy as np

    from imagegpt_jax import images

    rows, columns = gpt.setup.layout.grid
    size = rows * tok.downsample, columns * tok.downsample
    found = []
    for path in paths:
        try:
            found.append(images.read_picture(path, size))
        except OSError as e:
            raise UserError(f"{path} is not a picture that can be read ({e}).") from None
    return np.stack(found)


def sketch(asked: list[Request], gpt: "Decoder", tok: "Tokenizer", seed: int) -> "Sketch":
    """What the flags ask to be drawn.

    Raises:
      UserError: for arguments that do not fit the decoder.
    """
    import dataclasses

    from imagegpt_jax import images
    from imagegpt_jax.generation import functional
    from imagegpt_jax.generation import request as sketches
    from imagegpt_jax.generation.pipeline import Sketch

    words, labels = [request.text for request in asked], [request.label for request in asked]
    name = task()
    found = Sketch(prompts=words, classes=labels, grid=numbers(GRID, 2) if GRID.value else None)  # type: ignore[arg-type]
    if name in OF_PICTURES:
        source = pictures(_value(name), gpt, tok)
        if name == "inpaint":
            try:
                mask = images.read_mask(MASK.value, source.shape[1:3])
            except OSError as e:
                raise UserError(f"--mask={MASK.value} is not a picture that can be read ({e}).") from None
            found = sketches.inpaint(gpt, tok, source, mask, words, labels)
        elif name == "outpaint":
            found = sketches.outpaint(gpt, tok, source, numbers(MARGINS, 4), words, labels)  # type: ignore[arg-type]
        elif name == "complete":
            mask = sketches.lower_mask(tok, source, KEEP.value)
            found = sketches.inpaint(gpt, tok, source, mask, words, labels)
        elif name == "edit" and REGION.value:
            mask = sketches.region_mask(source, numbers(REGION, 4))
            found = sketches.inpaint(gpt, tok, source, mask, words, labels)
        else:
            if name == "style_transfer":
                words = words if any(words) else functional.caption(gpt, tok, source)
                words = sketches.restyled(words, STYLE.value, SOURCE_STYLE.value)
            by_default = 1.0 if name == "style_transfer" else 0.5
            strength = by_default if STRENGTH.value is None else STRENGTH.value
            found = sketches.variations(gpt, tok, source, strength, words, labels, seed)
    elif name == "interpolate":
        found = sketches.interpolation(PROMPT.value[0], INTERPOLATE.value, FRAMES.value)
    if NEGATIVE.value:
        found = dataclasses.replace(found, negative=[NEGATIVE.value] * len(asked))
    return found
