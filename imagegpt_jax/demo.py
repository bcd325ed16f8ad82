"""The whole of imagegpt_jax on the built-in pictures: train both stages, sample, evaluate.

Every step is a command that works by itself; it is printed before it runs.

  imagegpt-jax demo --output=runs/demo
  imagegpt-jax demo --output=/tmp/demo --size=test      # seconds, for tests; pictures are noise
"""

import json
import pathlib
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping

from absl import flags

from imagegpt_jax import cli, errors

OUTPUT = flags.DEFINE_string("output", "runs/demo", "Folder for everything that the demo makes.")
SIZE = flags.DEFINE_enum("size", "emoji", ["emoji", "test"], "Size of both networks: see configs/.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the trainings and samples.", lower_bound=0)

RES = {"emoji": 32, "test": 16}
GENERATION = {"emoji": (100, 4), "test": (4, 1)}  # prompts and samples of each that are scored
PROMPTS = (
    "noto emoji of red heart",
    "twemoji emoji of red heart",
    "fluent emoji of red heart",
    "noto emoji of blue circle",
    "twemoji emoji of green apple",
    "fluent emoji of pizza",
    "noto emoji of smiling face with sunglasses",
    "twemoji emoji of smiling face with sunglasses",
    "fluent emoji of dog face",
    "noto emoji of full moon",
    "twemoji emoji of rainbow flag",
    "fluent emoji of soccer ball",
)


def run(title: str, module: str, *arguments: str) -> None:
    """Runs one binary and shows its command.

    Raises:
      UserError: if it fails.
    """
    command = [sys.executable, "-m", "imagegpt_jax", module, *arguments]
    print(f"\n== {title}\n$ {shlex.join(['imagegpt-jax', module, *arguments])}", flush=True)
    started = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    if code:
        raise errors.UserError(
            f"the demo stopped because `{module}` failed with exit status {code}: see its last words above."
        )
    print(f"   {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """Runs the demo."""
    started = time.perf_counter()
    out = pathlib.Path(OUTPUT.value).resolve()
    size, res, seed = SIZE.value, RES[SIZE.value], SEED.value
    if out.exists() and any(out.iterdir()):
        print(f"{out} is there already: finished steps of the demo are not repeated.", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, decoder, tokens = out / "tokenizer", out / "decoder", out / "tokens"

    run(
        "1/5 Train the image tokenizer",
        "train",
        f"--config=tokenizer:size={size}",
        f"--workdir={tokenizer}",
        f"--config.seed={seed}",
    )
    for split in ("train", "validation"):
        run(
            f"2/5 Encode the {split} pictures",
            "encode",
            f"--tokenizer={tokenizer}",
            f"--data=emoji:{split},res={res}",
            f"--output={tokens / split}",
        )
    run(
        "3/5 Train the decoder on words and codes",
        "train",
        f"--config=decoder:size={size}",
        f"--workdir={decoder}",
        f"--config.seed={seed}",
        f"--config.tokenizer={tokenizer}",
        f"--config.data.train=tokens:{tokens / 'train'}",
        f"--config.data.validation=tokens:{tokens / 'validation'}",
    )
    run(
        "4/5 Sample",
        "sample",
        f"--decoder={decoder}",
        *(f"--prompt={prompt}" for prompt in PROMPTS),
        "--num_images=4",
        f"--seed={seed}",
        f"--output={out / 'samples'}",
        "--overwrite",
    )
    prompts, samples = GENERATION[size]
    run(
        "5/5 Evaluate both stages",
        "evaluate",
        f"--checkpoint={tokenizer}",
        f"--checkpoint={decoder}",
        f"--generation_prompts={prompts}",
        f"--samples_per_prompt={samples}",
        f"--images_dir={out}",
        f"--report={out / 'report.html'}",
        *(("--protocol=emoji", "--metrics=kid") if size == "emoji" else ()),
        f"--output={out / 'metrics.json'}",
    )
    report(out, time.perf_counter() - started)


def explain(scores: Mapping[str, float]) -> list[str]:
    """What it means where a score is not better than its control; empty where all are."""
    notes = []
    if scores["decoder/val_image_bits_per_token"] >= scores["decoder/unigram_image_bits_per_token"]:
        notes.append(
            "The decoder predicts codes no better than the unigram control, which knows only how often each code"
            " occurs: so far it has learned nothing from captions or from neighbouring codes. It needs more steps"
            " (--size=test takes 8, for tests)."
        )
    if scores["generation/retrieval_top1"] <= scores["generation/retrieval_top1_shuffled"]:
        notes.append(
            "The samples show their prompts no better than the control, the same samples with their prompts shuffled:"
            " the decoder does not follow captions yet. It needs more steps, or a tokenizer whose reconstructions show"
            " what they should (reconstructions.png)."
        )
    return [textwrap.fill(f"No better than its control: {note}", 100, subsequent_indent="  ") for note in notes]


def report(out: pathlib.Path, seconds: float) -> None:
    """Says what came out and where to look."""
    scores = json.loads((out / "metrics.json").read_text())
    bits, unigram = scores["decoder/val_image_bits_per_token"], scores["decoder/unigram_image_bits_per_token"]
    top1, shuffled = scores["generation/retrieval_top1"], scores["generation/retrieval_top1_shuffled"]
    lines = (
        ("reconstruction of unseen concepts", f"{scores['tokenizer/val_psnr']:.2f} dB PSNR"),
        ("codes used by them", f"{scores['tokenizer/codebook_usage']:.0%}"),
        (
            "prediction of unseen concepts",
            f"{bits:.2f} bits per image token, unigram {unigram:.2f}: {1 - bits / unigram:.0%} less",
        ),
        ("right picture for the prompt", f"{top1:.1%} top-1, shuffled prompts {shuffled:.1%}"),
    )
    print(f"\nDone in {seconds / 60:.1f} minutes.\n")
    for name, value in lines:
        print(f"  {name:36}{value}")
    print()
    for note in explain(scores):
        print(f"  {note}\n")
    for path in (out / "samples" / "grid.png", out / "report.html", out / "metrics.json"):
        print(f"  {path}")
    print(f"  tensorboard --logdir {out}\n")


if __name__ == "__main__":
    cli.run(main)
