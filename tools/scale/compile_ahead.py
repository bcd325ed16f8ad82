"""Compiles a config's programs for TPU slices that are not there: memory, communication, FLOPs, an estimate of time.

The *actual* training step is compiled by the TPU compiler on this CPU machine (`pip install -e '.[tpu]'`), and for a
decoder also prefill and decode step of sampling. Nothing of it is measured on a TPU.

A decoder's step is the one for token shards of images that were encoded once by `encode`; with --inputs=images, the one
that encodes the images of `data.train` itself with the frozen tokenizer, which takes longer to compile.

  python tools/scale/compile_ahead.py --config=configs/decoder.py:size=3B --topology=v5e-256
  python tools/scale/compile_ahead.py --config=configs/decoder.py:size=B --topology=v5e-256 --slices=2 --output=B.json
  python tools/scale/compile_ahead.py --config=configs/tokenizer.py:size=vq16 --topology=v5e-16 --programs=adversarial
"""

import json
import os
import pathlib
import sys
from typing import Any

import topologies
from absl import flags

from imagegpt_jax import cli, errors

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice as Cloud names it: v4-128, v5e-256, v5p-512, v6e-256; default: the config's own."
)
SLICES = flags.DEFINE_integer("slices", 1, "Number of such slices; `data` spans them.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Global batch; 0 = the config's, rounded up to the devices.")
PROGRAMS = flags.DEFINE_list(
    "programs",
    [],
    "Which to compile: train, prefill, decode of a decoder; reconstruction, adversarial of an image tokenizer; default"
    " all.",
)
INPUTS = flags.DEFINE_enum(
    "inputs", "tokens", ["tokens", "images"], "What a decoder's step is given; an image tokenizer's is given images."
)
OUTPUT = flags.DEFINE_string("output", None, "JSON file of one object per program, written after each.")
XLA = flags.DEFINE_string("xla", "", "Options of the TPU compiler to try besides the config's: name=value,name=value.")
EFFORT = flags.DEFINE_float(
    "effort",
    0.0,
    "Effort of the compiler for the speed of the program; at -1 an image tokenizer compiles in a tenth of the time"
    " (JAX_EXEC_TIME_OPTIMIZATION_EFFORT, where it is trained).",
    lower_bound=-1.0,
    upper_bound=1.0,
)
HLO = flags.DEFINE_string("hlo", None, "Folder for the text of the compiled programs.")

GIB = 1 << 30


def describe(report: dict) -> str:
    """A report in a few lines."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    slices = f"{report['slices']} x " if report["slices"] > 1 else ""
    share = report["peak_bytes"] / report["hbm_bytes"]
    inputs = f" of {report['inputs']}" if "inputs" in report else ""
    frozen = report.get("frozen_parameters", 0)
    lines = [
        f"{report['program']} on {slices}{report['topology']} ({mesh}), batch {report['batch_size']}{inputs},"
        f" {report['parameters'] / 1e6:,.0f} M parameters"
        + (f", {frozen / 1e6:,.0f} M of them frozen" if frozen else ""),
        f"  compiled in {report['compile_seconds']:.1f} s; host memory {report['host_peak_rss_bytes'] / GIB:.2f} GiB",
        f"  per device: arguments {report['argument_bytes'] / GIB:.3f}, temporary {report['temp_bytes'] / GIB:.3f},"
        f" peak {report['peak_bytes'] / GIB:.3f} of {report['hbm_bytes'] / GIB:.0f} GiB ({share:.0%})",
        f"  model FLOPs per device {report['model_flops_per_device']:.3g}; largest replicated parameter"
        f" {report['largest_replicated_parameter_bytes'] / 1024:.0f} KiB",
    ]
    for kind, total in report["collectives"].items():
        bound = f" (bound {total['bound_bytes'] / 1e6:,.1f})" if total["bound_bytes"] else ""
        lines.append(f"  {kind:<18} {total['count']:>6} {total['bytes'] / 1e6:>12,.1f} MB{bound}")
    if report["collective_bound_bytes"]:
        ratio = report["collective_bytes"] / report["collective_bound_bytes"]
        lines.append(f"  all communication is {ratio:.2f} x its bound")
    if "bytes_accessed" in report:
        lines.append(
            f"  a step accesses {report['bytes_accessed'] / GIB:.3f} GiB, {report['accessed_over_read']:.2f} x weights"
            f" {report['weights_bytes'] / GIB:.3f} and cache {report['cache_bytes'] / GIB:.3f};"
            f" {report['alias_bytes'] / GIB:.3f} GiB are updated in place"
        )
    times = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in report["roofline_estimate_seconds"].items())
    lines.append(
        f"  estimate from peak rates, not measured: {times}; MFU at most {report['roofline_estimate_mfu']:.0%}"
    )
    return "\n".join(lines)


def main() -> None:
    """Compiles what the flags describe.

    Raises:
      UserError: if that is not possible; at the end, if programs did not fit: the others are reported and saved.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler needs no device, and must not take one
    import reports as reports_lib

    from imagegpt_jax.perf import aot
    from imagegpt_jax.runtime import filesystem
    from imagegpt_jax.tasks import interface
    from imagegpt_jax.training.steps import compiler_options

    config = interface.find(CONFIG.value.task).perf.with_inputs(CONFIG.value, INPUTS.value)
    if not (TOPOLOGY.value or config.topology):
        raise errors.UserError(
            "this config is not written for a TPU slice: give --topology, such as --topology=v5e-16."
        )
    topology = topologies.parse_topology(TOPOLOGY.value or config.topology, SLICES.value)
    plan = aot.Plan(aot.fit(config, topology, BATCH_SIZE.value), topology)
    known = {program.name: program for program in plan.programs()}
    for name in PROGRAMS.value:
        if name not in known:
            raise errors.UserError(f"unknown program {name!r}.{errors.suggest(name, known)}")
    options = compiler_options(XLA.value, "tpu")
    reports: list[dict] = []

    def save() -> None:
        if OUTPUT.value:
            with filesystem.writing(OUTPUT.value):
                pathlib.Path(OUTPUT.value).write_text(json.dumps(reports, indent=1) + "\n")

    if OUTPUT.value:  # what cannot be written is told now, not after minutes of compiling
        filesystem.prepare_folder(pathlib.Path(OUTPUT.value).parent, OUTPUT.value)
    if HLO.value:
        filesystem.prepare_folder(HLO.value)
    too_large = []
    for name in PROGRAMS.value or known:
        try:
            report, text = reports_lib.compile_program(plan, known[name], options, EFFORT.value)
        except reports_lib.OutOfMemory as e:
            print(f"{name} does not fit: {e}", file=sys.stderr)
            too_large.append(name)
            continue
        reports.append(report)
        save()
        print(describe(report), flush=True)
        if HLO.value:
            with filesystem.writing(HLO.value):
                (pathlib.Path(HLO.value) / f"{name}.txt").write_text(text)
    if OUTPUT.value:
        print(f"Wrote {OUTPUT.value}", file=sys.stderr)
    if too_large:
        raise errors.UserError(does_not_fit(too_large, plan.config, topology))


def does_not_fit(names: list[str], config: Any, topology: Any) -> str:
    """What to say of programs that the compiler cannot fit into memory: one sentence, with the rows a device has."""
    from imagegpt_jax.parallel import sharding

    sizes = sharding.mesh_shape(config.mesh, topology.chips)
    parts = sizes["data"] * sizes["fsdp"]
    sampling = all(name in ("prefill", "decode") for name in names)
    # Guided sampling has two rows a sample; training takes the parts of a batch one after another.
    rows = 2 * config.batch_size // parts if sampling else config.batch_size // (parts * config.accumulate)
    slices = f"{topology.slices} x " if topology.slices > 1 else ""
    remedy = "a smaller --batch_size" + ("" if sampling else " or a larger --config.accumulate")
    return (
        f"{', '.join(names)} {'does' if len(names) == 1 else 'do'} not fit {slices}{topology.name} at batch"
        f" {config.batch_size} ({rows} rows a device{'' if sampling else ' at a time'}): give {remedy}."
    )


if __name__ == "__main__":
    cli.run(main)
