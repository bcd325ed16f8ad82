"""Trains the same tokenizer with each quantizer and compares them: docs/quantizers.json and docs/quantizers.md.

  python tools/benchmarks/compare_quantizers.py                      # every quantizer without a score at these steps
  python tools/benchmarks/compare_quantizers.py --quantizers=fsq,ibq # these alone, even if they are scored already
  python tools/benchmarks/compare_quantizers.py --render             # only write the page from what is kept

All see the same pictures in the same order for the same number of steps, at the same rate (bits for each vector) and,
to a few parts in a thousand, with the same number of parameters. A run that was cut short goes on from its checkpoint,
and scores are put beside it: so quantizers may be trained one at a time, in any order or at once, and whichever call
finds all of them scored writes the page.
"""

import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from imagegpt_jax import cli, errors

STEPS = flags.DEFINE_integer("steps", 400, "Training steps of each quantizer.", lower_bound=1)
SIZE = flags.DEFINE_string("size", "emoji", "Size of configs/tokenizer.py.")
QUANTIZERS = flags.DEFINE_list("quantizers", [], "Train and score these alone; all that are not scored by default.")
WORKDIR = flags.DEFINE_string("workdir", "runs/quantizers", "Folder for the training runs.")
RENDER = flags.DEFINE_bool("render", False, "Only write the page from what is kept.")

ROOT = pathlib.Path(__file__).resolve().parents[2]
KEPT, PAGE = ROOT / "docs" / "quantizers.json", ROOT / "docs" / "quantizers.md"
LOG_EVERY = 5
HALVES = 100  # random divisions of the pictures
NAMES = {
    "vq": "VQ, on the unit sphere",
    "vq_plain": "VQ",
    "vq_ema": "VQ, moving averages",
    "ibq": "IBQ",
    "fsq": "FSQ",
    "lfq": "LFQ",
    "bsq": "BSQ",
    "residual": "RQ",
    "grouped": "VQ, grouped",
}


def train(name: str, workdir: pathlib.Path) -> None:
    """Trains a quantizer, or goes on with its training.

    Raises:
      UserError: if it fails.
    """
    command = [
        sys.executable, "-m", "imagegpt_jax.train", f"--config=configs/tokenizer.py:size={SIZE.value},quantizer={name}",
        f"--workdir={workdir}", f"--config.steps={STEPS.value}", f"--config.eval_every={STEPS.value}",
        f"--config.log_every={LOG_EVERY}", f"--config.checkpoint.every={5 * LOG_EVERY}",
    ]  # fmt: skip
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise errors.UserError(f"training {name} failed: its last words are above; the same command goes on with it.")


def pictures(config: Any) -> np.ndarray:
    """uint8 [N, H, W, C]: the validation split of a run."""
    from imagegpt_jax.data import pipeline, sources
    from imagegpt_jax.images import to_uint8

    source = sources.open_source(config.data.validation)
    batches = pipeline.Batches(
        source, ops=config.data.eval_ops, batch_size=64, shuffle=False, epochs=1, columns=("image",)
    )
    parts = [to_uint8(batch["image"][batch["mask"]]) for batch in batches]
    batches.close()
    return np.concatenate(parts)


def thumbnails(images_NHWC: np.ndarray) -> np.ndarray:
    """Features for KID, [N, 768]: pictures averaged down to 16 x 16, in [-1, 1]."""
    from imagegpt_jax.metrics.retrieval import box_downsample

    return box_downsample(images_NHWC / 127.5 - 1).reshape(len(images_NHWC), -1)


def psnr(fake_NHWC: np.ndarray, real_NHWC: np.ndarray) -> float:
    """Mean over pictures, in dB."""
    error_N = np.mean(np.square(real_NHWC.astype(np.float64) - fake_NHWC), axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error_N, 1e-6))))


def score(tok: Any, real_NHWC: np.ndarray) -> dict[str, Any]:
    """PSNR, KID of reconstructions and use of the codes of a tokenizer, on these pictures."""
    from imagegpt_jax.images import to_uint8
    from imagegpt_jax.metrics import common, kernels

    codes_NL = tok.encode(real_NHWC)
    fake_NHWC = to_uint8(tok.decode(codes_NL))
    counts_K = np.bincount(codes_NL.ravel(), minlength=tok.num_codes)
    return {
        "psnr": psnr(fake_NHWC, real_NHWC),
        "kid": kernels.mmd2_unbiased(thumbnails(fake_NHWC), thumbnails(real_NHWC), paired=True),
        "codebook_usage": float(np.mean(counts_K > 0)),
        "code_entropy_bits": common.entropy_bits(counts_K),
        "images": len(real_NHWC),
        "total_codes": codes_NL.size,
    }


def controls(real_NHWC: np.ndarray, codes: int, num_codes: int) -> dict[str, float]:
    """What the scores are of pictures that no tokenizer made.

    Args:
      real_NHWC: the originals.
      codes: how many codes they become.
      num_codes: how many different ones there are.

    Returns:
      KID of one half of the originals against the other, mean and standard deviation over random halves; KID and PSNR
      of pictures replaced by their mean colours; use and entropy of codes drawn at random.
    """
    from imagegpt_jax.metrics import common, kernels

    rng = np.random.default_rng(0)
    features, half = thumbnails(real_NHWC), len(real_NHWC) // 2
    halves = []
    for _ in range(HALVES):
        order = rng.permutation(len(features))
        halves.append(kernels.mmd2_unbiased(features[order[:half]], features[order[half : 2 * half]]))
    flat = np.broadcast_to(real_NHWC.mean((1, 2), keepdims=True), real_NHWC.shape)
    counts_K = np.bincount(rng.integers(num_codes, size=codes), minlength=num_codes)
    return {
        "halves_kid": float(np.mean(halves)),
        "halves_kid_std": float(np.std(halves)),
        "mean_color_kid": kernels.mmd2_unbiased(thumbnails(flat), features, paired=True),
        "mean_color_psnr": psnr(flat, real_NHWC),
        "random_usage": float(np.mean(counts_K > 0)),
        "random_entropy_bits": common.entropy_bits(counts_K),
    }


def step_seconds(workdir: pathlib.Path, batch_size: int) -> float:
    """Seconds of a training step in the fastest logging interval but the first, which compiles."""
    lines = [json.loads(line) for line in (workdir / "timing.jsonl").read_text().splitlines()]
    return batch_size / max(line["timing/examples_per_second"] for line in lines[1:] or lines)


def compare(name: str) -> dict[str, Any]:
    """Everything about one quantizer."""
    import jax

    import imagegpt_jax as ig
    from imagegpt_jax import train_state
    from imagegpt_jax.inference.tokenizer import read_tokenizer

    workdir = folder() / name
    train(name, workdir)
    setup, params, step = read_tokenizer(workdir)
    quantizer = setup.model.quantizer
    real_NHWC = pictures(setup.config)
    bits = quantizer.codes_per_vector * math.log2(quantizer.num_codes)
    scores = score(ig.load_tokenizer(workdir), real_NHWC)
    return {
        "name": name,
        "steps": step,
        "size": SIZE.value,
        "parameters": train_state.count_params(params),
        "codes": f"{quantizer.codes_per_vector} of {quantizer.num_codes}",
        "bits": bits,
        **scores,
        "controls": controls(real_NHWC, scores["total_codes"] // quantizer.codes_per_vector, round(2**bits)),
        "step_seconds": step_seconds(workdir, setup.config.batch_size),
        "device": jax.devices()[0].device_kind,
    }


def folder() -> pathlib.Path:
    """Where the runs of this size and number of steps lie, and what is known of them as NAME.json."""
    return ROOT / WORKDIR.value / f"{SIZE.value}-{STEPS.value}"


def scored() -> list[dict[str, Any]]:
    """What is known of the quantizers at this size and number of steps."""
    paths = [folder() / f"{name}.json" for name in NAMES]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """The page's table, best PSNR first."""
    lines = [
        "| quantizer | codes of a vector | parameters | PSNR dB | KID x 1000 | codes used | entropy bits | s / step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in sorted(reports, key=lambda r: -r["psnr"]):
        lines.append(
            f"| {NAMES[report['name']]} | {report['codes']} | {report['parameters']:,} | {report['psnr']:.2f} |"
            f" {1000 * report['kid']:.2f} | {report['codebook_usage']:.0%} | {report['code_entropy_bits']:.2f} |"
            f" {report['step_seconds']:.2f} |"
        )
    return "\n".join(lines)


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """The whole page.

    Raises:
      UserError: if the reports are not of equal steps, pictures and rate, and of nearly equal parameters.
    """
    first = reports[0]
    for key in ("steps", "size", "images", "bits"):
        if len({report[key] for report in reports}) > 1:
            raise errors.UserError(f"the kept quantizers differ in {key}: train those of another {key} again.")
    counts = [report["parameters"] for report in reports]
    if max(counts) > 1.01 * min(counts):
        raise errors.UserError(
            f"the kept quantizers have {min(counts):,} to {max(counts):,} parameters, over 1% apart."
        )
    control = first["controls"]
    halves = f"{1000 * control['halves_kid']:.2f} +- {1000 * control['halves_kid_std']:.2f}"
    flat, used = f"{1000 * control['mean_color_kid']:.2f}", f"{control['random_usage']:.0%}"
    return f"""# Quantizer comparison

Written by `python tools/benchmarks/compare_quantizers.py` from [quantizers.json](quantizers.json). Each row is the
tokenizer `configs/tokenizer.py:size={first["size"]},quantizer=NAME` after **{first["steps"]} steps** on the same
pictures in the same order, {first["bits"]:g} bits for each vector, scored on the {first["images"]} validation pictures,
whose concepts were not trained on. {first["steps"]} steps are few: the table compares how the quantizers begin, not
where they end.

{table(reports)}

*KID* is the unbiased squared maximum mean discrepancy with the cubic kernel of arXiv:1801.01401 between reconstructions
and originals, on pictures averaged down to 16 x 16 (no network); none is compared with its own original.
*Codes used* and *entropy* are of the codes of the validation pictures, at most {first["bits"]:g} bits where a vector
has one code. *s / step* is of the fastest {LOG_EVERY} training steps in a row, on one `{first["device"]}` device of the
machine that trained it, which had other work as well.

Controls, which no tokenizer made:

| | PSNR dB | KID x 1000 | codes used | entropy bits |
|---|---|---|---|---|
| originals, one half against the other ({HALVES} random halves) | | {halves} | | |
| every picture replaced by its mean colour | {control["mean_color_psnr"]:.2f} | {flat} | | |
| codes of {first["bits"]:g} bits drawn at random | | | {used} | {control["random_entropy_bits"]:.2f} |
"""


def main() -> None:
    """Trains what is missing, and writes the page once nothing is."""
    if RENDER.value:
        if not KEPT.exists():
            raise errors.UserError(f"nothing is kept in {KEPT}: run without --render first.")
        PAGE.write_text(page(json.loads(KEPT.read_text())))
        return
    unknown = set(QUANTIZERS.value) - set(NAMES)
    if unknown:
        raise errors.UserError(f"unknown quantizers {', '.join(sorted(unknown))}: known are {', '.join(NAMES)}.")
    wanted = QUANTIZERS.value or [name for name in NAMES if not (folder() / f"{name}.json").exists()]
    for i, name in enumerate(wanted, 1):
        print(f"[{i}/{len(wanted)}] {name}", file=sys.stderr, flush=True)
        report = compare(name)
        (folder() / f"{name}.json").write_text(json.dumps(report) + "\n")
    reports = scored()
    missing = set(NAMES) - {report["name"] for report in reports}
    if missing:
        print(f"No page yet: {', '.join(sorted(missing))} not scored at {STEPS.value} steps.", file=sys.stderr)
        return
    text = page(reports)
    KEPT.write_text("[\n" + ",\n".join(json.dumps(report) for report in reports) + "\n]\n")
    PAGE.write_text(text)


if __name__ == "__main__":
    cli.run(main)
