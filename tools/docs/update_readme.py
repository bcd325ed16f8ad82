"""Brings the README's pictures, tables and notebook output up to date with a finished demo.

Whatever stands between `<!-- NAME -->` and `<!-- /NAME -->` in README.md is replaced.

  make demo && python tools/docs/update_readme.py --demo=runs/demo
"""

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import marked
import numpy as np
from absl import flags
from PIL import Image

from imagegpt_jax import cli, errors
from imagegpt_jax import config as config_lib

CONFIGS_ONLY = flags.DEFINE_bool("configs_only", False, "Write the table of configs alone, which needs no demo.")
DEMO = flags.DEFINE_string("demo", "runs/demo", "Folder that `make demo` filled.")

ROOT = pathlib.Path(__file__).resolve().parents[2]
PICTURES = {"samples/grid.png": "docs/grid.png", "reconstructions.png": "docs/reconstructions.png"}
ABOUT = {
    ("decoder", "7B"): "LlamaGen 7B's shape: ImageNet classes to 256 px",
    ("decoder", "20B"): "of Parti's size: captions to 512 px, Adafactor",
    ("tokenizer", "test"): "for tests: 8 steps at 16 px",
    ("tokenizer", "emoji"): "the demo: 32 px, 8 x 8 codes of 512",
    ("tokenizer", "vq16"): "LlamaGen VQ-16: 256 px, 16 x 16 codes of 16384",
    ("tokenizer", "vq8"): "LlamaGen VQ-8: 256 px, 32 x 32 codes of 16384",
    ("decoder", "test"): "for tests: 8 steps, untrained tokenizer",
    ("decoder", "emoji"): "the demo: captions to 32 px emoji",
}


def scores_table(scores: dict[str, Any]) -> str:
    """The demo's scores, each beside its control."""
    bits, unigram = scores["decoder/val_image_bits_per_token"], scores["decoder/unigram_image_bits_per_token"]
    rows = (
        (
            "PSNR of the tokenizer, unseen concepts at 32 px",
            f"{scores['tokenizer/val_psnr']:.2f} dB",
            f"{scores['tokenizer/val_psnr_mean_color']:.2f} dB: each picture's mean colour",
        ),
        (
            "codes used on them",
            f"{scores['tokenizer/codebook_usage']:.1%}",
            f"perplexity {scores['tokenizer/codebook_perplexity']:.0f} of 512",
        ),
        (
            "bits per image token of the decoder, unseen concepts",
            f"{bits:.2f} ({1 - bits / unigram:.0%} below)",
            f"{unigram:.2f}: unigram entropy of the same tokens",
        ),
        (
            f"top-1 retrieval of {scores['generation/prompts']} training prompts at 16 x 16 pixels",
            f"{scores['generation/retrieval_top1']:.1%}",
            f"{scores['generation/retrieval_top1_shuffled']:.1%}: prompts shuffled",
        ),
    )
    lines = ["| score | demo | control |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} | {control} |" for name, value, control in rows])


def config_table() -> str:
    """Every shipped size with its parameter count, counted on abstract networks."""
    from imagegpt_jax import train_state
    from imagegpt_jax.tasks import decoder, tokenizer

    lines = ["| config | size | what it is | parameters |", "|---|---|---|---|"]
    for name, task, network in (("tokenizer", tokenizer, "generator"), ("decoder", decoder, "decoder")):
        module = config_lib.sibling(str(ROOT / "configs" / "x.py"), f"{name}.py")
        for size in module.MODELS:
            networks = task.setup_abstract(module.get_config(f"size={size}")).networks
            count = train_state.count_params(networks[network].abstract) / 1e6
            about = ABOUT.get((name, size), f"LlamaGen {size}: ImageNet classes to 256 px")
            lines.append(f"| `configs/{name}.py` | `{size}` | {about} | {count:,.{1 if count < 100 else 0}f} M |")
    return "\n".join(lines)


def notebook_output(text: str) -> str:
    """Runs the README's Python example and returns what it prints, as a block."""
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    if match is None:
        raise errors.UserError("README.md has no Python example: put it back.")
    done = subprocess.run([sys.executable, "-c", match[1]], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise errors.UserError(f"README.md's Python example failed: {done.stderr.strip().splitlines()[-1]}")
    return f"```\n{done.stdout.strip()}\n```"


def main() -> None:
    """Updates README.md and docs/."""
    readme = ROOT / "README.md"
    blocks = {"configs": config_table()}
    if not CONFIGS_ONLY.value:
        demo = pathlib.Path(DEMO.value)
        if not (demo / "metrics.json").exists():
            raise errors.UserError(f"{demo} holds no finished demo: run `make demo` first, or give --demo.")
        for source, target in PICTURES.items():
            (ROOT / target).parent.mkdir(exist_ok=True)
            with Image.open(demo / source) as picture:  # the pixels alone: the metadata of samples names local folders
                Image.fromarray(np.asarray(picture)).save(ROOT / target, optimize=True)
        blocks["scores"] = scores_table(json.loads((demo / "metrics.json").read_text()))
        blocks["notebook"] = notebook_output(readme.read_text())
    marked.fill(readme, **blocks)
    print(f"Updated {readme}" + ("." if CONFIGS_ONLY.value else f" and {len(PICTURES)} pictures."))


if __name__ == "__main__":
    cli.run(main)
