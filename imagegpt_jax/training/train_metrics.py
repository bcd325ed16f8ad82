"""Metrics: what a step reports, where it is written, and how fast the run goes.

A step returns a dict of clu metrics (mergeable totals that stay on the device); the loop merges them and fetches the
totals once per logging interval. Values that follow from the config alone go to `metrics.jsonl`, so that two runs of
one command can be compared byte for byte; clock readings go to `timing.jsonl`. Both go to TensorBoard.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from etils import epath
from flax import struct

from imagegpt_jax.runtime import filesystem

Totals = dict[str, clu_metrics.Metric]


def mean(values: jax.Array, weights: jax.Array | None = None) -> clu_metrics.Average:
    """The (weighted) mean of an array, over everything it is merged with."""
    values = jnp.asarray(values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if weights is None:
        weights = jnp.ones_like(values)
    total, count = (values * weights).sum(), weights.sum().astype(jnp.float32)
    # flax dataclasses get their constructor at run time
    return clu_metrics.Average(total=total, count=count)  # pyright: ignore[reportCallIssue]


@struct.dataclass
class Entropy(clu_metrics.Metric):
    """Entropy in bits of the empirical distribution of ids: what the best unigram model of this data would score.

    Attributes:
      counts_V: occurrences of each id.
    """

    counts_V: jax.Array

    def merge(self, other: "Entropy") -> "Entropy":
        """Adds the counts."""
        return self.replace(counts_V=self.counts_V + other.counts_V)  # pyright: ignore[reportAttributeAccessIssue]

    def compute(self) -> jax.Array:
        """Entropy in bits."""
        p = self.counts_V / jnp.maximum(self.counts_V.sum(), 1)
        return -jnp.sum(jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1)), 0))


@struct.dataclass
class UsedShare(clu_metrics.Metric):
    """Share of the codes that occurred at all.

    Attributes:
      counts_V: occurrences of each code.
    """

    counts_V: jax.Array

    def merge(self, other: "UsedShare") -> "UsedShare":
        """Adds the counts."""
        return self.replace(counts_V=self.counts_V + other.counts_V)  # pyright: ignore[reportAttributeAccessIssue]

    def compute(self) -> jax.Array:
        """Between 0 and 1."""
        return jnp.mean(self.counts_V > 0)


def entropy(counts_V: jax.Array) -> Entropy:
    """Metric of the entropy of ids with these counts."""
    return Entropy(counts_V=counts_V)  # pyright: ignore[reportCallIssue]


def used_share(counts_V: jax.Array) -> UsedShare:
    """Metric of the share of codes that occur, with these counts."""
    return UsedShare(counts_V=counts_V)  # pyright: ignore[reportCallIssue]


def merge(totals: Totals, step: Totals) -> Totals:
    """Adds one step's metrics to the totals."""
    return {name: totals[name].merge(step[name]) for name in step}


def fetch(totals: Totals) -> dict[str, float]:
    """Waits for the totals and computes their values: the one host sync of a logging interval."""
    host = jax.device_get(totals)
    return {name: float(metric.compute()) for name, metric in host.items()}


class Writer:
    """Writes scalars and pictures of one run; on processes other than the first it does nothing.

    Args:
      workdir: the run's folder.
      resume_step: lines of later steps, left by a run that was cut off, are dropped.

    Raises:
      UserError: (every method) if a file cannot be written.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int = 0):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from clu import metric_writers  # imports TensorFlow

        self._workdir = epath.Path(workdir)
        self._files: dict[str, Any] = {}
        self._open = contextlib.ExitStack()  # a bucket's files are context managers only
        with filesystem.writing(workdir):
            self._board = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))
        self.rewind(resume_step)

    def rewind(self, resume_step: int) -> None:
        """Drops the lines of later steps."""
        if not self._active:
            return
        with filesystem.writing(self._workdir):
            self._open.close()
            for name in ("metrics", "timing"):
                path = self._workdir / f"{name}.jsonl"
                old = path.read_bytes().decode("utf-8", "replace").splitlines() if path.exists() else []
                kept = [line for line in old if _step_of(line) <= resume_step]
                path.write_text("".join(f"{line}\n" for line in kept))
                self._files[name] = self._open.enter_context(path.open("a"))

    def scalars(self, step: int, values: Mapping[str, float], file: str = "metrics") -> None:
        """Writes a line {"step": ..., name: value, ...}; `file` is "metrics" or "timing"."""
        if self._active:
            line = {"step": step, **{k: float(v) for k, v in values.items()}}
            with filesystem.writing(self._workdir):
                self._files[file].write(json.dumps(line) + "\n")
                self._files[file].flush()
                self._board.write_scalars(step, dict(values))

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text to TensorBoard, which shows it as it is."""
        if self._active:
            with filesystem.writing(self._workdir):
                self._board.write_texts(step, {name: "".join(f"    {line}\n" for line in text.splitlines())})

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 [n, H, W, 3], to TensorBoard."""
        if self._active and images:
            with filesystem.writing(self._workdir):
                self._board.write_images(step, dict(images))

    def close(self) -> None:
        """Flushes everything."""
        if self._active:
            with filesystem.writing(self._workdir), self._open:
                self._board.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # the torn last line of a run that was killed


class Throughput:
    """Clock of the loop: rates since the last reading, and what share of the time went elsewhere.

    Args:
      devices: number of devices.
      peak_flops: FLOP/s of each, for MFU; None where it is not known, such as on CPU.

    Attributes:
      last: of the last reading, `seconds` and how many of them were waited for data, checkpoints and evaluations.
    """

    def __init__(self, devices: int = 1, peak_flops: float | None = None) -> None:
        self._devices, self._peak_flops = devices, peak_flops
        self._start = self._last = time.perf_counter()
        self._done = {"examples": 0.0, "tokens": 0.0, "flops": 0.0}
        self._waited = {"data_wait": 0.0, "checkpoint": 0.0, "evaluation": 0.0}
        self.last: dict[str, float] = {}

    def add(self, kind: str, seconds: float) -> None:
        """Counts time that was not spent in training steps."""
        self._waited[kind] += seconds

    def count(self, examples: int, tokens: int = 0, flops: float = 0.0) -> None:
        """Counts what a step has done: examples, tokens of sequences (0 for images), model FLOPs."""
        for kind, value in (("examples", examples), ("tokens", tokens), ("flops", flops)):
            self._done[kind] += value

    def read(self) -> dict[str, Any]:
        """Readings since the last call: MFU (arXiv:2204.02311, appendix B) is of the time spent in steps."""
        now = time.perf_counter()
        seconds = max(now - self._last, 1e-9)
        steps = max(seconds - self._waited["evaluation"] - self._waited["checkpoint"], 1e-9)
        out = {"timing/examples_per_second": self._done["examples"] / steps, "timing/seconds": now - self._start}
        if self._done["tokens"]:
            out["timing/tokens_per_second_per_device"] = self._done["tokens"] / steps / self._devices
        if self._peak_flops:
            out["timing/mfu"] = self._done["flops"] / steps / self._devices / self._peak_flops
        out |= {f"timing/{kind}_share": spent / seconds for kind, spent in self._waited.items()}
        self.last = {"seconds": seconds, **{f"{kind}_seconds": spent for kind, spent in self._waited.items()}}
        self._last = now
        self._done, self._waited = dict.fromkeys(self._done, 0.0), dict.fromkeys(self._waited, 0.0)
        return out
