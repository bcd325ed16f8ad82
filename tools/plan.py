"""Finds the largest batch that fits a TPU slice, and the cheapest recomputation at it; shows that the next do not fit.

Every answer is a compilation by the TPU compiler (`tools/compile_ahead.py`), never a measurement.

  python tools/plan.py --config=configs/decoder.py:size=3B --topology=v5e-256
"""

import json
import os
import pathlib
import sys
from typing import Any

import plan_search
from absl import flags

from imagegpt_jax import cli

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice, such as v5e-256; default: the config's own.")
SLICES = flags.DEFINE_integer("slices", 1, "Number of such slices.", lower_bound=1)
SHARE = flags.DEFINE_float("share", 0.9, "Share of a chip's memory that may be planned.", 0.1, 1.0)
OUTPUT = flags.DEFINE_string("output", None, "JSON file with everything that was compiled.")

GIB = 1 << 30
# From cheapest in time to cheapest in memory.
REMATS = ("none", "dots", "attention", "full")


class Search:
    """Compiles the training step at batches and remats, once each."""

    def __init__(self, config: Any, topology: Any, share: float):
        from imagegpt_jax import sharding

        self.config, self.topology = config, topology
        self.limit = share * topology.chip.hbm_bytes
        sizes = sharding.mesh_shape(config.mesh, topology.chips)
        self.rows = sizes["data"] * sizes["fsdp"] * config.accumulate  # examples in a batch of one a device
        self.tried: dict[tuple[int, str], int | None] = {}
        self.plan: Any = None

    def peak(self, per_device: int, remat: str) -> int | None:
        """Compiled peak bytes; None where the compiler itself finds no way to fit."""
        if (per_device, remat) not in self.tried:
            from imagegpt_jax import ahead

            config = self.config.copy_and_resolve_references()
            config.batch_size = per_device * self.rows
            config.model.remat = remat
            self.plan = ahead.Plan(config, self.topology)
            try:
                report, _ = self.plan.compile(list(self.plan.programs())[self._program()])
                peak = report["peak_bytes"]
            except ahead.OutOfMemory:
                peak = None
            self.tried[per_device, remat] = peak
            text = "does not compile into memory" if peak is None else f"peak {peak / GIB:.2f} GiB"
            print(f"batch {config.batch_size} ({per_device} a device), remat {remat}: {text}", file=sys.stderr)
        return self.tried[per_device, remat]

    def _program(self) -> int:
        return len(self.plan.task.phases(self.plan.setup)) - 1  # the last phase needs most

    def fits(self, per_device: int, remat: str) -> bool:
        """Whether a step does."""
        peak = self.peak(per_device, remat)
        return peak is not None and peak <= self.limit

    def largest(self, remat: str) -> int:
        """The largest batch a device at a remat; 0 if not even one example fits."""
        return plan_search.largest(lambda per_device: self.peak(per_device, remat), self.limit)


def remats(config: Any) -> tuple[Any, ...]:
    """The choices of a task's network."""
    return REMATS if config.task == "decoder" else (False, True)


def table(plan: Any, peak: int) -> str:
    """Memory of a device by what it holds."""
    import jax

    def held(part: str) -> int:
        pairs = zip(
            jax.tree.leaves(getattr(plan.state, part)), jax.tree.leaves(getattr(plan.layout, part)), strict=True
        )
        sizes = (x.dtype.itemsize * int(jax.numpy.prod(jax.numpy.array(s.shard_shape(x.shape)))) for x, s in pairs)
        return sum(sizes)

    parts = {
        "parameters": held("trainable") + held("frozen"),
        "optimizer": held("opt"),
        "moving average": held("ema"),
        "statistics": held("stats"),
    }
    parts["activations, gradients, gathered parameters"] = max(0, peak - sum(parts.values()))
    lines = [f"  {name:<46} {size / GIB:8.3f} GiB" for name, size in parts.items() if size]
    return "\n".join([*lines, f"  {'peak':<46} {peak / GIB:8.3f} GiB"])


def main() -> None:
    """Plans what the flags describe."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from imagegpt_jax import ahead, hardware

    config = CONFIG.value
    if not (TOPOLOGY.value or config.topology):
        raise cli.UserError("this config is not written for a TPU slice: give --topology, such as --topology=v5e-16.")
    topology = hardware.parse_topology(TOPOLOGY.value or config.topology, SLICES.value)
    search = Search(ahead.fit(config, topology), topology, SHARE.value)
    choices = remats(config)
    least = choices[-1]
    per_device = search.largest(least)
    if not per_device:
        raise cli.UserError(
            f"not even one example a device fits {topology.name} with remat={least!r}: use a larger slice."
        )
    remat = next(r for r in choices if r == least or search.fits(per_device, r))
    peak = search.peak(per_device, remat)
    assert peak is not None
    plan_config = search.config.copy_and_resolve_references()
    plan_config.batch_size, plan_config.model.remat = per_device * search.rows, remat
    limit = search.limit / GIB
    print(f"largest batch: {per_device * search.rows} ({per_device} a device); cheapest remat at it: {remat!r}")
    print(table(ahead.Plan(plan_config, topology), peak))
    over = search.peak(per_device + 1, least)
    shown = "does not compile into memory" if over is None else f"peaks at {over / GIB:.3f} GiB"
    print(f"  {per_device + 1} a device with remat {least!r} {shown}: over {limit:.2f} GiB")
    for cheaper in choices[: choices.index(remat)]:
        over = search.peak(per_device, cheaper)
        shown = "does not compile into memory" if over is None else f"peaks at {over / GIB:.3f} GiB"
        print(f"  remat {cheaper!r} at {per_device} a device {shown}: over {limit:.2f} GiB")
    print(f"set: --config.batch_size={per_device * search.rows} --config.model.remat={remat}")
    if OUTPUT.value:
        tried = [{"per_device": b, "remat": r, "peak_bytes": p} for (b, r), p in search.tried.items()]
        found = {"batch_size": per_device * search.rows, "remat": remat, "limit_bytes": search.limit, "tried": tried}
        pathlib.Path(OUTPUT.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
