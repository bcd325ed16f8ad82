"""Compiles the programs of a plan, and reads off what they will need.

The TPU compiler (libtpu) runs on any CPU machine. What it gives is *compiled*, never measured: memory is the compiler's
own plan, communication is read from its HLO text, FLOPs are counted from shapes, times are estimates from peak rates.
"""

import importlib.metadata
import resource
import time
from collections.abc import Mapping
from typing import Any

import jax
import traffic

from imagegpt_jax import train_state
from imagegpt_jax.errors import UserError
from imagegpt_jax.parallel import sharding
from imagegpt_jax.perf import aot, hlo
from imagegpt_jax.tasks.interface import Program
from imagegpt_jax.training.steps import compiler_options, options_told

# Bytes/s of one chip to other slices: "data center network bandwidth per Pod" of the Cloud TPU pages of v5e and v6e
# (6.4 and 25.6 Tbps), over 256 chips. Those of v4 and v5p give none, so there is no estimate for them.
DCN_BANDWIDTH = {"v5e": 6.4e12 / 8 / 256, "v6e": 25.6e12 / 8 / 256}


class OutOfMemory(UserError):
    """The compiler found no way to fit a program into the memory of the chip."""


def compile_program(
    plan: aot.Plan, program: Program, options: Mapping[str, str | bool] | None = None, effort: float = 0.0
) -> tuple[dict[str, Any], str]:
    """Compiles a program of a plan.

    Args:
      plan: of a config on a slice.
      program: one of its `programs`.
      options: options of the TPU compiler, besides those of the config (which are the training step's).
      effort: that it makes for the speed of the program, -1 to 1; programs of many convolutions compile in a tenth
        of the time with -1.

    Returns:
      (report: JSON values, see docs/scale.md; text of the optimized HLO)
    """
    training = program.trains
    options = {**(compiler_options(plan.config.compiler_options, "tpu") if training else {}), **(options or {})}
    started = time.perf_counter()
    with jax.set_mesh(plan.mesh):
        lowered = program.lower()
    traced, worked = time.perf_counter(), time.process_time()
    try:
        with options_told(options):
            compiled = lowered.compile({"exec_time_optimization_effort": effort, **options})
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" in str(e):
            raise OutOfMemory(str(e).splitlines()[0]) from e
        raise
    done, worked = time.perf_counter(), time.process_time() - worked
    memory, text = compiled.memory_analysis(), compiled.as_text()
    chip, devices = plan.topology.chip, plan.topology.chips
    moved = hlo.count(text)
    bound = plan.bound() if training else {}
    flops = program.model_flops / devices
    sent = sum(total.bytes for total in moved.values())
    crossing = moved[hlo.BETWEEN_SLICES].bytes if hlo.BETWEEN_SLICES in moved else 0
    accessed = traffic.hbm_bytes(text) if program.reads else 0
    if training:
        moved_bytes = 2 * memory.argument_size_in_bytes + 2 * memory.temp_size_in_bytes
    else:
        moved_bytes = accessed or memory.argument_size_in_bytes + memory.output_size_in_bytes
    estimate = {
        "compute": flops / chip.flops,
        "hbm": moved_bytes / chip.hbm_bandwidth,
        "ici": (sent - crossing) / chip.ici_bandwidth,
    }
    if plan.topology.slices > 1 and plan.topology.generation in DCN_BANDWIDTH:
        estimate["dcn"] = crossing / DCN_BANDWIDTH[plan.topology.generation]
    report = {
        "config": plan.config.to_dict(),
        "program": program.name,
        "topology": plan.topology.name,
        "slices": plan.topology.slices,
        "mesh": {a: sharding.mesh_shape(plan.config.mesh, devices)[a] for a in sharding.CONFIG_AXES},
        "batch_size": plan.config.batch_size,
        "parameters": train_state.count_params(program.parameters()),
        "trace_seconds": round(traced - started, 2),
        "compile_seconds": round(done - traced, 2),
        "compile_processor_seconds": round(worked, 2),  # of all threads
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "hbm_bytes": chip.hbm_bytes,
        "model_flops_per_device": flops,
        "collectives": {
            kind: {
                "count": moved[kind].count if kind in moved else 0,
                "bytes": moved[kind].bytes if kind in moved else 0,
                "bound_bytes": bound.get(kind, 0),
            }
            for kind in hlo.KINDS
            if kind in moved or bound.get(kind)
        },
        "collective_bytes": sent,
        "collective_bound_bytes": sum(bound.values()),
        "largest_replicated_parameter_bytes": aot.largest_replicated(program.parameters()),
        "roofline_estimate_seconds": {name: round(value, 6) for name, value in estimate.items()},
        "roofline_estimate_mfu": round(estimate["compute"] / max(max(estimate.values()), 1e-12), 4),
        "host_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "compiler_options": options,
        "compiler_effort": effort,
        "versions": versions(),
    }
    if training:
        report |= {"inputs": plan.inputs, "frozen_parameters": train_state.count_params(plan.state.frozen)}
        report |= _widest(plan, text)
    if program.reads:
        reads = program.reads()
        report |= {f"{name}_bytes": size for name, size in reads.items()}
        report["bytes_accessed"] = accessed
        report["accessed_over_read"] = round(accessed / sum(reads.values()), 4)
    return report, text


def _widest(plan: aot.Plan, text: str) -> dict[str, int]:
    """Bytes of the largest arrays that a sequence's step must not have: scores of attention, float32 logits."""
    if plan.task.perf.sequence is None:
        return {}
    length, vocabulary = plan.task.perf.sequence(plan.setup)
    shape = plan.mesh.shape
    rows = plan.config.batch_size // (shape["data"] * shape["fsdp"] * shape["fsdp_minor"] * plan.config.accumulate)
    return {
        "attention_scores_bytes": traffic.largest_square(text, length),
        "largest_float32_bytes": traffic.largest(text, "f32"),
        "full_logits_bytes": 4 * rows * length * vocabulary // shape["tensor"],
    }


def versions() -> dict[str, str]:
    """Of what decides a compilation."""
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "libtpu": importlib.metadata.version("libtpu"),
    }
