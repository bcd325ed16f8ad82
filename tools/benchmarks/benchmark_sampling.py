"""What `tools/benchmarks/benchmark.py sample` runs and what it makes of the readings. Imports neither JAX nor PyTorch.

Shapes of LlamaGen-B: images are drawn with guidance, so the network sees twice as many rows. Systems take turns, each
reading in a process of its own; medians are reported.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import benchmark_workloads as workloads
import numpy as np

from imagegpt_jax import errors


@dataclasses.dataclass(frozen=True)
class Workload:
    """Pictures to draw and the shape of the decoder.

    Attributes:
      images: drawn at once.
      side: codes along each side of a picture.
      codes: size of the codebook.
      classes: number of classes.
      width: of the model.
      depth: blocks.
      heads: of attention.
      mlp_width: hidden width of SwiGLU.
      top_k: codes that a draw chooses among.
      cfg_scale: of guidance.
    """

    images: int = 4
    side: int = 16
    codes: int = 16384
    classes: int = 1000
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 2048
    top_k: int = 2000
    cfg_scale: float = 4.0

    @property
    def tokens(self) -> int:
        """Codes of a picture."""
        return self.side**2

    @property
    def read_per_step(self) -> int:
        """Numbers that a step has to read: blocks, head, and the cache of an image's two rows, half full on average."""
        block = 4 * self.width**2 + 3 * self.width * self.mlp_width
        cache = 2 * self.images * self.depth * 2 * self.width * self.tokens // 2
        return self.depth * block + self.codes * self.width + cache


WORKLOADS = {
    "full": Workload(),
    "test": Workload(images=2, side=4, codes=64, classes=5, width=32, depth=2, heads=2, mlp_width=48, top_k=20),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
      system: whose sampler.
      mode: how it decodes.
      dtype: of weights and computation.
      script: that measures it.
    """

    system: str
    mode: str
    dtype: str
    script: str


OURS, TORCH = "benchmark_sampling_jax.py", "benchmark_sampling_torch.py"
LINES = (
    Line("imagegpt_jax", "plain", "float32", OURS),
    Line("imagegpt_jax", "plain", "bfloat16", OURS),
    Line("imagegpt_jax", "int8", "float32", OURS),
    Line("imagegpt_jax", "speculative", "float32", OURS),
    *(Line("LlamaGen's sampler", "plain", dtype, TORCH) for dtype in ("float32", "bfloat16")),
    *(
        Line("transformers", mode, dtype, TORCH)
        for mode in ("generate, default cache", "generate, static cache", "one batch, default cache",
                     "one batch, static cache")
        for dtype in ("float32", "bfloat16")
    ),
)  # fmt: skip


def resident() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_resident() -> int:
    """The most bytes of memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bandwidth(size: int) -> float:
    """Bytes per second at which all cores together read `size` bytes of memory: the best of several passes."""
    cores = workloads.cores()
    parts = [np.ones(size // 4 // cores, np.float32) for _ in range(cores)]
    best = float("inf")
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for _ in range(8):
            started = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            best = min(best, time.perf_counter() - started)
    return sum(part.nbytes for part in parts) / best


def rows(
    readings: Mapping[Line, Sequence[Mapping[str, Any]]], workload: Workload, rates: Sequence[float]
) -> list[dict[str, Any]]:
    """The lines of the table, with the bound in float32 as the last.

    Args:
      readings: what each process of a line printed.
      workload: what was drawn.
      rates: bytes per second at which the machine reads memory, one for each turn.
    """
    count = workload.images * workload.tokens
    table = []
    for line, runs in readings.items():
        seconds = [statistics.median(run["seconds"]) for run in runs]
        rates_of_runs = [count / s for s in seconds]
        table.append(
            {
                "system": line.system,
                "mode": line.mode,
                "dtype": line.dtype,
                "tokens_per_second": statistics.median(rates_of_runs),
                "readings": rates_of_runs,
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
                "peak_rss_over_imports_bytes": max(run["peak_rss_bytes"] - run["imports_rss_bytes"] for run in runs),
                **runs[0].get("facts", {}),
            }
        )
    rate = statistics.median(rates)
    table.append(
        {
            "system": "bound",
            "mode": "weights and cache read once a step",
            "dtype": "float32",
            "tokens_per_second": workload.images * rate / (4 * workload.read_per_step),
            "readings": [workload.images * r / (4 * workload.read_per_step) for r in rates],
            "peak_rss_bytes": 4 * workload.read_per_step,
            "bytes_per_second": rate,
        }
    )
    return table


def ratios(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Our plain float32 line over LlamaGen's in float32 and over transformers' best, and the bound over it."""
    rate = {(row["system"], row["mode"], row["dtype"]): row["tokens_per_second"] for row in table}
    ours = rate["imagegpt_jax", "plain", "float32"]
    quotients = {"bound / ours": next(v for k, v in rate.items() if k[0] == "bound") / ours}
    if ("LlamaGen's sampler", "plain", "float32") in rate:
        quotients["ours / LlamaGen's sampler"] = ours / rate["LlamaGen's sampler", "plain", "float32"]
        quotients["ours / best of transformers"] = ours / max(v for k, v in rate.items() if k[0] == "transformers")
    return quotients


def text(table: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    lines = ["| system | mode | dtype | tokens/s | peak memory over imports, MiB |", "|---|---|---|---:|---:|"]
    for row in table:
        memory = row.get("peak_rss_over_imports_bytes", row["peak_rss_bytes"]) / 2**20
        lines.append(
            f"| {row['system']} | {row['mode']} | {row['dtype']} | {row['tokens_per_second']:.1f} | {memory:,.0f} |"
        )
    return "\n".join([*lines, "", "; ".join(f"{name} {value:.2f}" for name, value in ratios(table).items())])


def measure(line: Line, size: str, seconds: float) -> dict[str, Any]:
    """One process's reading of a line.

    Raises:
      UserError: if it fails.
    """
    script = str(pathlib.Path(__file__).with_name(line.script))
    flags = {"system": line.system, "mode": line.mode, "dtype": line.dtype, "size": size, "seconds": seconds}
    command = [sys.executable, script, *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, cwd=workloads.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise errors.UserError(f"{line.script} failed with exit status {done.returncode}: see its last words above.")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(size: str, repeats: int, seconds: float, ours_only: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measures every line `repeats` times, in turns.

    Returns:
      (rows of the table, versions of what ran)
    """
    workload = WORKLOADS[size]
    lines = [line for line in LINES if line.script == OURS or not ours_only]
    readings: dict[Line, list[dict[str, Any]]] = {line: [] for line in lines}
    rates, versions = [], {"python": sys.version.split()[0]}
    for turn in range(repeats):
        rates.append(bandwidth(2**30 if size == "full" else 2**22))
        for line in lines:
            readings[line].append(measure(line, size, seconds))
            versions |= readings[line][-1]["versions"]
            rate = workload.images * workload.tokens / statistics.median(readings[line][-1]["seconds"])
            print(
                f"{turn + 1}/{repeats} {line.system}, {line.mode}, {line.dtype}: {rate:.1f} tokens/s", file=sys.stderr
            )
    return rows(readings, workload, rates), versions
