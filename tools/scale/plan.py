"""Finds the largest batch that fits a TPU slice, and the cheapest recomputation at it; shows that the next do not fit.

Every answer is a compilation by the TPU compiler (`compile_ahead.py`), never a measurement. As there, a decoder's
step is the one for token shards; with --inputs=images, the one that encodes images itself.

  python tools/scale/plan.py --config=configs/decoder.py:size=3B --topology=v5e-256
"""

import itertools
import json
import os
import pathlib
import sys
from typing import Any

import plan_search
import topologies
from absl import flags

from imagegpt_jax import cli, errors

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice, such as v5e-256; default: the config's own.")
SLICES = flags.DEFINE_integer("slices", 1, "Number of such slices.", lower_bound=1)
SHARE = flags.DEFINE_float("share", 0.9, "Share of a chip's memory that may be planned.", 0.1, 1.0)
INPUTS = flags.DEFINE_enum(
    "inputs", "tokens", ["tokens", "images"], "What a decoder's step is given; an image tokenizer's is given images."
)
OUTPUT = flags.DEFINE_string("output", None, "JSON file with the answer and everything that was compiled.")
EFFORT = flags.DEFINE_float(
    "effort",
    0.0,
    "Effort of the compiler for the speed of the program; at -1 an image tokenizer compiles in a tenth of the time.",
    lower_bound=-1.0,
    upper_bound=1.0,
)

GIB = 1 << 30


class Search:
    """Compiles the training step at batches and remats, once each.

    Batches are told by the examples that a device has at a time: with `accumulate` it has as many again in every part.

    Attributes:
      sizes: of the mesh, as `config.mesh` has them once -1 is filled.
      rows: examples of a batch for each that a device has at a time.
      limit: bytes of a chip that may be planned.
      tried: (examples a device has at a time, remat) -> compiled peak bytes; None where the compiler itself finds no
        way to fit.
    """

    def __init__(self, config: Any, topology: Any, share: float, effort: float = 0.0):
        from imagegpt_jax.parallel import sharding

        self.config, self.topology, self.effort = config, topology, effort
        self.limit = share * topology.chip.hbm_bytes
        self.sizes = sharding.mesh_shape(config.mesh, topology.chips)
        self.rows = self.sizes["data"] * self.sizes["fsdp"] * config.accumulate
        self.tried: dict[tuple[int, Any], int | None] = {}
        self.plan: Any = None

    def peak(self, at_once: int, remat: Any) -> int | None:
        """Compiled peak bytes; None where the compiler itself finds no way to fit."""
        if (at_once, remat) not in self.tried:
            import reports

            from imagegpt_jax.perf import aot

            self.plan = aot.Plan(self.configured(at_once, remat), self.topology)
            try:
                report, _ = reports.compile_program(self.plan, self._program(), effort=self.effort)
                peak = report["peak_bytes"]
            except reports.OutOfMemory:
                peak = None
            self.tried[at_once, remat] = peak
            text = "does not compile into memory" if peak is None else f"peak {peak / GIB:.2f} GiB"
            print(f"batch {self.describe(at_once)}, remat {remat}: {text}", file=sys.stderr)
        return self.tried[at_once, remat]

    def configured(self, at_once: int, remat: Any) -> Any:
        """A copy of the config at a batch and a remat."""
        config = self.config.copy_and_resolve_references()
        config.batch_size, config.model.remat = at_once * self.rows, remat
        return config

    def describe(self, at_once: int) -> str:
        """A batch, and what a device has of it."""
        parts = self.config.accumulate
        share = f"{at_once * parts} a device" + (f", {at_once} in each of {parts} parts" if parts > 1 else "")
        return f"{at_once * self.rows} ({share})"

    def _program(self) -> Any:
        phases = self.plan.task.phases(self.plan.setup)
        return next(itertools.islice(self.plan.programs(), len(phases) - 1, None))  # the last phase needs most

    def fits(self, at_once: int, remat: Any) -> bool:
        """Whether a step does."""
        peak = self.peak(at_once, remat)
        return peak is not None and peak <= self.limit

    def largest(self, remat: Any) -> int:
        """The most examples that a device can have at a time at a remat; 0 if not even one fits."""
        return plan_search.largest(lambda at_once: self.peak(at_once, remat), self.limit)

    def flags(self, at_once: int, remat: Any) -> str:
        """What to add to `train`'s command for a batch and a remat: all that was compiled with besides the config."""
        settings = {"batch_size": at_once * self.rows, "accumulate": self.config.accumulate, "model.remat": remat}
        settings |= {f"mesh.{axis}": size for axis, size in self.sizes.items()}
        return " ".join(f"--config.{key}={value}" for key, value in settings.items())

    def summary(self, at_once: int, remat: Any) -> dict[str, Any]:
        """The answer and what was compiled, as JSON values."""
        import reports

        parts = self.config.accumulate
        return {
            "config": self.configured(at_once, remat).to_dict(),
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "mesh": self.sizes,
            "accumulate": parts,
            "batch_size": at_once * self.rows,
            "per_device": at_once * parts,
            "remat": remat,
            "inputs": self.plan.inputs,
            "limit_bytes": self.limit,
            "compiler_effort": self.effort,
            "versions": reports.versions(),
            "tried": [
                {"batch_size": b * self.rows, "per_device": b * parts, "remat": r, "peak_bytes": p}
                for (b, r), p in self.tried.items()
            ],
        }


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
    from imagegpt_jax.perf import aot
    from imagegpt_jax.runtime import filesystem
    from imagegpt_jax.tasks import interface

    perf = interface.find(CONFIG.value.task).perf
    config = perf.with_inputs(CONFIG.value, INPUTS.value)
    if not (TOPOLOGY.value or config.topology):
        raise errors.UserError(
            "this config is not written for a TPU slice: give --topology, such as --topology=v5e-16."
        )
    topology = topologies.parse_topology(TOPOLOGY.value or config.topology, SLICES.value)
    search = Search(aot.fit(config, topology), topology, SHARE.value, EFFORT.value)
    if OUTPUT.value:
        # What cannot be written is told now, not after minutes of compiling.
        filesystem.prepare_folder(pathlib.Path(OUTPUT.value).parent, OUTPUT.value)
    choices = perf.remats
    least = choices[-1]
    at_once = search.largest(least)
    if not at_once:
        raise errors.UserError(
            f"not even one example a device fits {topology.name} with remat={least!r}: use a larger slice."
        )
    remat = next(r for r in choices if r == least or search.fits(at_once, r))
    peak = search.peak(at_once, remat)
    assert peak is not None
    limit = search.limit / GIB
    plan = aot.Plan(search.configured(at_once, remat), topology)
    print(f"largest batch of {plan.inputs}: {search.describe(at_once)}; cheapest remat at it: {remat!r}")
    print(table(plan, peak))
    over = search.peak(at_once + 1, least)
    shown = "does not compile into memory" if over is None else f"peaks at {over / GIB:.3f} GiB"
    print(f"  {search.describe(at_once + 1)} with remat {least!r} {shown}: over {limit:.2f} GiB")
    for cheaper in choices[: choices.index(remat)]:
        over = search.peak(at_once, cheaper)
        shown = "does not compile into memory" if over is None else f"peaks at {over / GIB:.3f} GiB"
        print(f"  remat {cheaper!r} at the largest batch {shown}: over {limit:.2f} GiB")
    print(f"set: {search.flags(at_once, remat)}")
    if OUTPUT.value:
        with filesystem.writing(OUTPUT.value):
            pathlib.Path(OUTPUT.value).write_text(json.dumps(search.summary(at_once, remat), indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
