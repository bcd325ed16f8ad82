"""Measures this program against PyTorch on this machine's CPU.

  python tools/benchmarks/benchmark.py train --output=benchmark.json      # about twenty minutes
  python tools/benchmarks/benchmark.py sample --output=sampling.json      # about half an hour
  python tools/benchmarks/benchmark.py train --ours_only --workloads=decoder

`train` times whole training steps in float32: forward, backward, clipping and optimizer. PyTorch's networks are those
of `transformers` (`pip install -e '.[parity]'`). Each reading is a process of its own, by turns: ours, ours without
`runtime/malloc.py`, and PyTorch's:

    decoder     LlamaGen-B on 4 x 256 codes of 16384, all scored; beside LlamaForCausalLM
    tokenizer   LlamaGen's VQ-16 at 128 px, batch 2, without perceptual and adversarial loss; beside JanusVQVAE

`sample` times the drawing of 4 x 256 codes with LlamaGen-B's shape, guidance and top-k 2000, beside LlamaGen's own
sampler, those of `transformers`, and the time to read weights and cache once a token (`benchmark_sampling.py`).

Each process of `train` also times the product of two 4096 x 4096 matrices before and after its steps. The machine's
rate is the better of the two libraries', and a step's share of it is model FLOPs / seconds / rate: products of three
forward passes, causal attention counted once, nothing for the optimizer.

A decoder's step has a floor besides (`benchmark_floor.py`).
"""

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import benchmark_floor
import benchmark_pieces
import benchmark_sampling
import benchmark_workloads as workloads
from absl import flags

from imagegpt_jax import cli, errors
from imagegpt_jax.runtime import malloc

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "docs"))
import marked

OUTPUT = flags.DEFINE_string("output", None, "Write the figures to this JSON file as well.")
PAGE = flags.DEFINE_string("page", None, "Also put the table into this page: docs/training.md or docs/sampling.md.")
SECONDS = flags.DEFINE_float(
    "seconds",
    30.0,
    "Time for at least this long in each process; `sample` draws one set of images anyway.",
    lower_bound=0.0,
)
REPEATS = flags.DEFINE_integer("repeats", 3, "Processes of each side.", lower_bound=1)
SIZE = flags.DEFINE_enum("size", "full", workloads.SIZES, "full, or tiny for tests.")
WORKLOADS = flags.DEFINE_list("workloads", list(workloads.WORKLOADS), "Which `train` times: decoder, tokenizer.")
OURS_ONLY = flags.DEFINE_boolean("ours_only", False, "Time our step alone, as it comes.")

SCRIPTS = {"ours": "benchmark_jax.py", "returning": "benchmark_jax.py", "torch": "benchmark_torch.py"}
SIDES = {
    "ours": "imagegpt_jax",
    "returning": "the same, memory returned to the system",
    "torch": "transformers, PyTorch",
}
VARIABLES = {"returning": {malloc.KEEP: "0"}}
UNITS = {"decoder": "tokens", "tokenizer": "images"}
READINGS = ("seconds", "processor_seconds", "gemm_seconds", "product_seconds", "piece_seconds", "stream_seconds")
BUSY = 0.5  # load average above which other programs are said to be running


def summarise(readings: Mapping[str, Sequence[Mapping[str, Any]]], units: int, side: int) -> dict[str, Any]:
    """What the readings of one workload come to.

    Args:
      readings: side ("ours", and "returning" and "torch" where they ran) -> what each of its processes printed.
      units: tokens or images of a step.
      side: of the matrices whose product was timed.

    Returns:
      {"model_flops", "gemm_flops_per_second" of the machine, an entry for each side, "ratio" of the rates, "ratios"
      of each pair of processes}; for each side its parameters, medians, rates and readings.
    """
    flops = readings["ours"][0]["model_flops"]
    sides: dict[str, Any] = {}
    for name, runs in readings.items():
        medians = [statistics.median(run["seconds"]) for run in runs]
        seconds = statistics.median(medians)
        gemm = statistics.median([s for run in runs for s in run["gemm_seconds"]])
        sides[name] = {
            "parameters": runs[0]["parameters"],
            "seconds": seconds,
            "processor_seconds": statistics.median([s for run in runs for s in run["processor_seconds"]]),
            "units_per_second": units / seconds,
            "flops_per_second": flops / seconds,
            "gemm_flops_per_second": 2 * side**3 / gemm,
            "first_loss": runs[0]["losses"][0],
            "last_loss": runs[0]["losses"][-1],
            "medians": medians,
            "readings": [{key: run[key] for key in READINGS if key in run} for run in runs],
        }
    rate = max(figures["gemm_flops_per_second"] for figures in sides.values())
    for figures in sides.values():
        figures["share_of_gemm"] = figures["flops_per_second"] / rate
    summary = {"model_flops": flops, "gemm_flops_per_second": rate, **sides}
    if "torch" in sides:
        summary["ratio"] = sides["torch"]["seconds"] / sides["ours"]["seconds"]
        pairs = zip(sides["torch"]["medians"], sides["ours"]["medians"], strict=True)
        summary["ratios"] = [torch / ours for torch, ours in pairs]
    return summary


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries of workloads as Markdown."""
    lines = [
        "| step | side | million parameters | s a step | rate | GFLOP/s | share of the GEMM rate |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for workload, summary in summaries.items():
        for name, system in SIDES.items():
            if name in summary:
                side = summary[name]
                lines.append(
                    f"| {workload} | {system} | {side['parameters'] / 1e6:.1f} | {side['seconds']:.3f} |"
                    f" {side['units_per_second']:.4g} {UNITS[workload]}/s | {side['flops_per_second'] / 1e9:.0f} |"
                    f" {side['share_of_gemm']:.0%} |"
                )
    rates = [
        f"{workload}: {summary['model_flops'] / 1e9:,.1f} GFLOP a step, GEMM"
        f" {summary['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s{_ratio(summary)}"
        for workload, summary in summaries.items()
    ]
    floors = [benchmark_floor.text(workload, summary) for workload, summary in summaries.items() if "floor" in summary]
    return "\n".join([*lines, "", " ".join([". ".join(rates) + ".", *floors])])


def _ratio(summary: Mapping[str, Any]) -> str:
    if "ratio" not in summary:
        return ""
    low, high = min(summary["ratios"]), max(summary["ratios"])
    return f"; ours / PyTorch {summary['ratio']:.2f} (from {low:.2f} to {high:.2f} pair by pair)"


def run_worker(name: str, workload: str) -> dict[str, Any]:
    """One process's reading.

    Raises:
      UserError: if it fails.
    """
    script = str(pathlib.Path(__file__).with_name(SCRIPTS[name]))
    command = [sys.executable, script, f"--workload={workload}", f"--size={SIZE.value}", f"--seconds={SECONDS.value}"]
    environment = {**os.environ, **VARIABLES.get(name, {})}
    done = subprocess.run(command, cwd=workloads.ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise errors.UserError(f"{SCRIPTS[name]} failed with exit status {done.returncode}: see its last words above.")
    return json.loads(done.stdout.strip().splitlines()[-1])


def train() -> None:
    """Runs `train`.

    Raises:
      UserError: for an unknown workload, or without PyTorch.
    """
    for workload in WORKLOADS.value:
        if workload not in workloads.WORKLOADS:
            raise errors.UserError(f"unknown workload {workload!r}.{errors.suggest(workload, workloads.WORKLOADS)}")
    load = look_around()
    summaries, versions = {}, {"python": sys.version.split()[0]}
    for workload in WORKLOADS.value:
        readings: dict[str, list[dict[str, Any]]] = {
            name: [] for name in SCRIPTS if name == "ours" or not OURS_ONLY.value
        }
        for repeat in range(REPEATS.value):
            for name, runs in readings.items():
                runs.append(run_worker(name, workload))
                versions |= runs[-1]["versions"]
                seconds = statistics.median(runs[-1]["seconds"])
                print(f"{workload} {repeat + 1}/{REPEATS.value} {name}: {seconds:.3f} s a step", file=sys.stderr)
        config = workloads.make_config(workload, SIZE.value)
        units = workloads.units_per_step(workload, config)
        summary = summaries[workload] = summarise(readings, units, workloads.GEMM_SIDE[SIZE.value])
        if workload == "decoder":
            rate, numbers = summary["gemm_flops_per_second"], workloads.STREAM[SIZE.value]
            sizes, others = benchmark_floor.matrices(config), benchmark_pieces.shapes(config)
            summary["floor"] = benchmark_floor.floor(readings, rate, units, sizes, others, numbers)
    show(table(summaries))
    report(load, versions, {"workloads": summaries})


def sample() -> None:
    """Runs `sample`.

    Raises:
      UserError: without PyTorch.
    """
    load = look_around()
    rows, versions = benchmark_sampling.run(SIZE.value, REPEATS.value, SECONDS.value, OURS_ONLY.value)
    show(benchmark_sampling.text(rows))
    report(load, versions, {"rows": rows, "ratios": benchmark_sampling.ratios(rows)})


def look_around() -> float:
    """The load average, and a word about what else is running.

    Raises:
      UserError: without PyTorch, if it is needed.
    """
    if not OURS_ONLY.value and importlib.util.find_spec("torch") is None:
        raise errors.UserError(
            "the comparison needs PyTorch: install it with `pip install -e '.[parity]'`, or give --ours_only."
        )
    load = os.getloadavg()[0]
    print(f"{workloads.cores()} cores, load average {load:.2f}", file=sys.stderr)
    if load > BUSY:
        print("Other programs are running: trust the ratio a little, and the seconds not at all.", file=sys.stderr)
    return load


def show(text: str) -> None:
    """Prints a table, and puts it into --page."""
    print(text)
    if PAGE.value:
        marked.fill(pathlib.Path(PAGE.value), rows=text)


def report(load: float, versions: Mapping[str, str], results: Mapping[str, Any]) -> None:
    """Prints the versions, and writes everything to --output."""
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if OUTPUT.value:
        about = {"size": SIZE.value, "cores": workloads.cores(), "load_average": load, "versions": versions}
        pathlib.Path(OUTPUT.value).write_text(json.dumps({**about, **results}, indent=1) + "\n")
        print(f"Wrote {OUTPUT.value}", file=sys.stderr)


COMMANDS = {"train": train, "sample": sample}


def take_command(arguments: list[str]) -> str:
    """Takes the sub-command out of the arguments; ends the program with one sentence if there is none that it knows."""
    if {"--help", "-h", "-help"} & set(arguments):
        return "train"
    if len(arguments) < 2 or arguments[1].startswith("-"):
        cli.fail(
            "say what to measure: python tools/benchmarks/benchmark.py train, or sample. See --help.", errors.EXIT_USAGE
        )
    command = arguments.pop(1)
    if command not in COMMANDS:
        cli.fail(f"unknown command {command!r}.{errors.suggest(command, COMMANDS)}", errors.EXIT_USAGE)
    return command


if __name__ == "__main__":
    cli.run(COMMANDS[take_command(sys.argv)])
