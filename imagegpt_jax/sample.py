"""Generates images with a trained decoder: text-to-image, class-conditional, unconditional, and from other images.

Writes one PNG per image, which carries its request, prompt, seed, sampler and the hash of the checkpoint in its
metadata, a captioned grid.png, and samples.jsonl with one line per image. The same command gives the same images, and
resumes where it was cut short.

  python -m imagegpt_jax.sample --decoder=runs/decoder --prompt="noto emoji of red heart" --output=samples
  python -m imagegpt_jax.sample --decoder=runs/decoder --prompts_file=prompts.txt --num_images=4 --seed=1 \\
      --cfg_scale=5 --top_k=200 --output=samples
  python -m imagegpt_jax.sample --decoder=runs/imagenet --class=golden_retriever --class=88 --output=samples
  python -m imagegpt_jax.sample --decoder=runs/decoder --inpaint=cat.png --mask=mask.png --prompt=hat --output=samples
  python -m imagegpt_jax.sample --decoder=runs/decoder --caption=cat.png --output=captions
  python -m imagegpt_jax.sample --from_image=samples/00000-red-heart.png --output=again
"""

import dataclasses
import re
import sys
from typing import Any

from absl import flags

from imagegpt_jax import cli, errors
from imagegpt_jax.generation import metadata, modes, output
from imagegpt_jax.generation.postprocess import PLUG_INS, Postprocessing
from imagegpt_jax.generation.prompts import check_prompt, read_prompts
from imagegpt_jax.generation.request import GenerationRequest, ImageInput, mode_of_entry
from imagegpt_jax.sampling.settings import RENAMED, Sampling

# First flag of a group -> its title in --help.
FLAG_GROUPS = {
    "prompt": "What to generate",
    "caption": "From images and between prompts: captioning, inpainting, outpainting, editing, interpolation",
    "decoder": "Networks, number of images, output",
    "temperature": "Sampling, by default the decoder's own settings",
    "upscaler": "Post-processing, safety filters, watermarks",
}

# ------------------------------------------------------------------------------------------- flags: what to generate

PROMPT = flags.DEFINE_multi_string("prompt", [], "What to generate; give it several times for several prompts.")
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    "",
    "File of prompts (UTF-8): one a line, where blank lines and lines beginning with # are skipped, or a .csv or .tsv"
    " with a header, such as PartiPrompts'.",
)
PROMPT_COLUMN = flags.DEFINE_string(
    "prompt_column", "", "Column of a .csv or .tsv; by default prompt, caption or text, whichever it has."
)
CLASS = flags.DEFINE_multi_string("class", [], "Class to generate, by name or number; may be given several times.")
UNCONDITIONAL = flags.DEFINE_bool("unconditional", False, "Also generate an image without any prompt.")
NEGATIVE = flags.DEFINE_string("negative", "", "Negative prompt: guidance moves samples away from it. By default none.")
GRID = flags.DEFINE_list(
    "grid",
    [],
    "Rows and columns of codes, such as 8,12, for another aspect ratio than the decoder was trained on.",
)
CAPTION = flags.DEFINE_multi_string("caption", [], "Picture to describe in words; may be given several times.")
INPAINT = flags.DEFINE_multi_string("inpaint", [], "Picture to inpaint: what --mask shows is generated anew.")
MASK = flags.DEFINE_string("mask", "", "For --inpaint: a picture, light where new pixels go.")
OUTPAINT = flags.DEFINE_multi_string("outpaint", [], "Picture to outpaint, around which --margins are generated.")
MARGINS = flags.DEFINE_list("margins", [], "For --outpaint: pixels at top,right,bottom,left, after resizing.")
COMPLETE = flags.DEFINE_multi_string("complete", [], "Picture of which to keep the upper part and generate the rest.")
KEEP = flags.DEFINE_float("keep", 0.5, "For --complete: how much of the height to keep, 0 to 1.")
VARIATIONS = flags.DEFINE_multi_string(
    "variations", [], "Picture of which a random share of the codes is generated anew."
)
EDIT = flags.DEFINE_multi_string("edit", [], "Picture to generate anew under --prompt, in --region or by --strength.")
REGION = flags.DEFINE_list("region", [], "For --edit: top,left,height,width in pixels, after resizing; the rest stays.")
STRENGTH = flags.DEFINE_float(
    "strength",
    None,
    "Share of the codes generated anew, 0 to 1; by default 0.5 for --variations and --edit, 1 for --style_transfer.",
)
STYLE_TRANSFER = flags.DEFINE_multi_string(
    "style_transfer", [], "Picture to generate in --style; --prompt is its caption, else the decoder writes one."
)
STYLE = flags.DEFINE_string("style", "", "For --style_transfer: name of the wanted style, such as twemoji.")
SOURCE_STYLE = flags.DEFINE_string("source_style", "", "For --style_transfer: name of the style it has in its caption.")
INTERPOLATE = flags.DEFINE_string("interpolate", "", "Prompt interpolation: a series from --prompt to this prompt.")
FRAMES = flags.DEFINE_integer("frames", 8, "For --interpolate: pictures of the series.", lower_bound=2)

# --- By which networks, how many, and where.
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
SEED = flags.DEFINE_integer("seed", 0, "Image i depends only on (seed, i).", lower_bound=0)
BEST_OF = flags.DEFINE_integer("best_of", None, "Best-of-N: sample so many of each and keep the best --num_images.", 1)
BEAMS = flags.DEFINE_integer(
    "beams", 0, "For --caption: search for the likeliest captions with so many beams; 0 = draw them.", lower_bound=0
)
SCORER = flags.DEFINE_string(
    "scorer",
    "likelihood",
    "For --best_of: likelihood, caption, words, clip:FOLDER, or module:function (see generation/scorers.py).",
)
TENSOR = flags.DEFINE_integer(
    "tensor",
    1,
    "Tensor parallelism: devices that heads and matrices are sharded over; images use the rest.",
    lower_bound=1,
)
GIF = flags.DEFINE_bool("gif", False, "Also write samples.gif, the first pictures filling code by code.")
NPZ = flags.DEFINE_bool("npz", False, "Also write samples.npz, all pictures as ADM's evaluation takes them.")

# --- Settings of how codes are sampled, by default the decoder's own; and of what is done to the images at the end.
DEFINE: dict[type, Any] = {
    **{int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string},
    **{bool: flags.DEFINE_bool, tuple: flags.DEFINE_list},
}


def define(settings: type) -> list[Any]:
    """A flag for each field of a dataclass, None where it is not given, with the words of its docstring."""
    helps = dict(re.findall(r"^ {6}(\w+): ((?:.|\n {8})*)", settings.__doc__ or "", re.MULTILINE))
    fields = dataclasses.fields(settings)
    words = {name: " ".join(text.split()) for name, text in helps.items()}
    return [DEFINE[type(f.default)](f.name, None, words[f.name][:1].upper() + words[f.name][1:]) for f in fields]


SETTINGS, POSTPROCESS = define(Sampling), define(Postprocessing)
for _old, _new in RENAMED.items():
    flags.DEFINE_alias(_old, _new)


# --------------------------------------------------------------------------------------------------------- the request


def numbers(flag: Any, count: int) -> tuple[int, ...]:
    """A list flag as whole numbers. Raises UserError if it is none, or of another length."""
    try:
        values = tuple(int(part) for part in flag.value)
    except ValueError:
        values = ()
    if len(values) != count:
        raise errors.UserError(
            f"--{flag.name}={','.join(flag.value)} must be {count} whole numbers with commas between."
        )
    return values


def words() -> tuple[list[str], list[str | None]]:
    """The prompts and the classes of the flags: prompts, file, classes, nothing, in this order."""
    texts = [check_prompt(text, f"--prompt number {i}") for i, text in enumerate(PROMPT.value, start=1)]
    if PROMPTS_FILE.value:
        texts += read_prompts(PROMPTS_FILE.value, PROMPT_COLUMN.value)
    labels = [None] * len(texts) + CLASS.value + [None] * UNCONDITIONAL.value
    return texts + [""] * (len(labels) - len(texts)), labels


def own_fields(mode: str) -> dict[str, Any]:
    """The fields of a request that are one mode's own, as far as their flags are given."""
    values: dict[str, Any] = {
        flag.name: flag.value for flag in (KEEP, STRENGTH, STYLE, SOURCE_STYLE, BEAMS) if flag.present
    }
    values |= {flag.name: numbers(flag, n) for flag, n in ((MARGINS, 4), (REGION, 4), (GRID, 2)) if flag.value}
    if MASK.value:
        values["mask"] = (ImageInput(MASK.value),)
    fields = {name: value for name, value in values.items() if name in modes.fields_of(mode)}
    if mode == "interpolate" and INTERPOLATE.value:
        second = check_prompt(INTERPOLATE.value, "--interpolate")
        return fields | {"second_prompt": second, "shares": modes.shares_of(FRAMES.value)}
    paths = flags.FLAGS[mode].value if mode in (*modes.OF_IMAGES, "caption") else []
    return fields | ({"images": tuple(map(ImageInput, paths))} if paths else {})


def request_of_flags(base: GenerationRequest | None) -> GenerationRequest:
    """The request that the flags describe, or `base`, that of --from_image, with the fields that they replace.

    Raises UserError for two modes at once, a mode without what it needs, or nothing to generate.
    """
    named = [name for name in (*modes.OF_IMAGES, "caption", "interpolate") if flags.FLAGS[name].value]
    if len(named) > 1:
        raise errors.UserError(f"--{named[0]} and --{named[1]} are two modes: run them one after the other.")
    texts, labels = words()
    if not (named or texts or base):
        raise errors.UserError("nothing to draw: give --prompt, --prompts_file, --class or --unconditional.")
    if named or (base is not None and (not texts or base.images or base.shares)):
        mode = named[0] if base is None or named else base.mode
    else:
        mode = "text_to_image" if PROMPT.value or PROMPTS_FILE.value else mode_of_entry((), labels)
    fields: dict[str, Any] = {"mode": mode} | own_fields(mode)
    if texts:
        fields["prompts"] = tuple(texts) if mode == "text_to_image" or any(texts) else ()
        fields["classes"] = tuple(labels) if any(label is not None for label in labels) else ()
    fields |= {flag.name: flag.value for flag in (SEED, NUM_IMAGES, BEST_OF, SCORER) if flag.present}
    if NEGATIVE.value:
        fields["negative"] = (NEGATIVE.value,)
    if fields.keys() & {"prompts", "classes", "images", "shares", "num_images", "best_of"}:
        fields["sample_indices"] = ()
    base = base or GenerationRequest()
    finish: dict[str, Any] = {flag.name: flag.value for flag in POSTPROCESS if flag.value is not None}
    if finish.get("resize"):
        finish["resize"] = numbers(flags.FLAGS["resize"], len(finish["resize"]))
    request = dataclasses.replace(
        base,
        settings={**base.settings, **{flag.name: flag.value for flag in SETTINGS if flag.value is not None}},
        postprocess=dataclasses.replace(base.postprocess, **finish),
        **fields,
    )
    modes.check(request)
    return request.hashed()


def check_trust(request: GenerationRequest) -> None:
    """Raises UserError where a PNG, which must not decide which code is run, names a plug-in that no flag names."""
    named = {name: getattr(request.postprocess, name) for name in PLUG_INS}
    named["cfg_schedule"] = str(request.settings.get("cfg_schedule", ""))
    for name, value in named.items():
        if ":" in value and not flags.FLAGS[name].present:
            raise errors.UserError(
                f"--from_image={FROM_IMAGE.value} was made with --{name}={value}: give that flag if you trust it."
            )


# ------------------------------------------------------------------------------------------------------------ the work


def main() -> None:
    """Generates what the flags describe."""
    made_by, base = metadata.read(FROM_IMAGE.value) if FROM_IMAGE.value else ({}, None)
    if base is not None:
        check_trust(base)
    where_from: tuple[Any, ...] = tuple(
        flag.value if flag.present else made_by.get(flag.name, flag.value) for flag in (DECODER, TOKENIZER, STEP)
    )
    decoder_path, tokenizer_path, step = where_from
    if not decoder_path:
        raise errors.UserError(
            "say which decoder is to draw: --decoder=WORKDIR, or --from_image=PNG of an earlier run."
        )
    request = request_of_flags(base)

    from etils import epath

    from imagegpt_jax import config as config_lib

    where = epath.Path(OUTPUT.value)
    output.check_output(where, None, OVERWRITE.value)
    if request.mode == "caption" and where.exists() and not OVERWRITE.value:
        raise errors.UserError(f"--output={where} is already there: give a new folder, or --overwrite.")
    for workdir in filter(None, (decoder_path, tokenizer_path)):
        config_lib.load(workdir)  # a wrong folder should not cost the seconds that JAX takes to start

    from imagegpt_jax.generation import scorers
    from imagegpt_jax.generation.functional import load_pipeline

    # --- Everything a person can get wrong, before any image.
    pipeline = load_pipeline(decoder_path, step, tokenizer=tokenizer_path or None)
    if request.mode == "caption":
        folder, _ = output.start(where, [])
        for path, captions in output.write_captions(pipeline, request, folder):
            print("\t".join([path, *captions]))
        output.finish(folder, where)
        return
    scorers.find(request.scorer)
    request = pipeline.resolved(request)
    rows = output.plan(request, pipeline)
    for name in ("decoder_hash", "tokenizer_hash"):
        if made_by.get(name, rows[0][name]) != rows[0][name]:
            raise errors.UserError(
                f"{FROM_IMAGE.value} was drawn by another {name.removesuffix('_hash')} (hash {made_by[name]}, and this"
                f" one has {rows[0][name]}): give the --decoder, --step and --tokenizer that drew it."
            )
    if output.check_output(where, rows, OVERWRITE.value):
        print(f"These {len(rows)} pictures are already there: {where}", file=sys.stderr)
        return
    for text in request.entries[0]:
        if len(pipeline.decoder.encode_text(text)) > pipeline.decoder.setup.layout.text_length:
            print(f"note: only the beginning of {text[:60]!r} fits the decoder's text length.", file=sys.stderr)

    # --- Images. The whole request is checked before the folder is made.
    images_from = pipeline.prepare(request, mesh=output.local_mesh(TENSOR.value))
    folder, done = output.start(where, rows)
    if done:
        print(f"Going on after the {len(done)} pictures that are already there.", file=sys.stderr)
    output.write_images(images_from(len(done)), rows, folder, len(done))
    output.overviews(request, folder, pipeline.grid(request), GIF.value, NPZ.value)
    output.finish(folder, where)
    left_out = len(request.entries[0]) - output.MAX_GRID_TILES
    print(
        f"Drew {len(rows)} pictures: {where}; overview in {where / output.GRID_FILE}"
        + (f" (without the last {left_out} prompts)" if left_out > 0 else ""),
        file=sys.stderr,
    )


if __name__ == "__main__":
    cli.run(main, cache=True)
