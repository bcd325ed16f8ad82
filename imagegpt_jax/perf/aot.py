"""Compiles the programs of a config for TPU slices that are not there, and reads off what they will need.

The TPU compiler (libtpu) runs on any CPU machine. What it gives is *compiled*, never measured: memory is the compiler's
own plan, communication is read from its HLO text, FLOPs are counted from shapes, times are estimates from peak rates.
"""

import functools
import resource
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from imagegpt_jax import train_state
from imagegpt_jax.config import Config
from imagegpt_jax.errors import UserError
from imagegpt_jax.parallel import sharding
from imagegpt_jax.perf import hlo
from imagegpt_jax.perf import traffic as traffic_lib
from imagegpt_jax.runtime import hardware
from imagegpt_jax.tasks import interface
from imagegpt_jax.tasks.interface import Program
from imagegpt_jax.training.steps import Steps, compiler_options, options_told

COMPUTE_BYTES = 2  # of parameters and activations on the way: bf16
# Bytes/s of one chip to other slices: "data center network bandwidth per Pod" of the Cloud TPU pages of v5e and v6e
# (6.4 and 25.6 Tbps), over 256 chips. Those of v4 and v5p give none, so there is no estimate for them.
DCN_BANDWIDTH = {"v5e": 6.4e12 / 8 / 256, "v6e": 25.6e12 / 8 / 256}


def fit(config: Config, topology: hardware.Topology, batch_size: int = 0) -> Config:
    """A copy of a config for a slice. On one it was not written for, `fsdp` fills, and `accumulate` doubles until the
    inputs of blocks that the backward pass keeps should take no more than a third of the memory. What the command line
    gave of these (`--config.mesh.tensor=2`, `--config.accumulate=1`) stays.

    Args:
      config: of either task.
      topology: the slice.
      batch_size: global batch; 0 takes the config's, rounded up to a multiple of the devices.

    Raises:
      UserError: for an `accumulate` below 1, or a mesh of the command line that does not fit the slice.
    """
    config = ConfigDict(config.to_dict())
    if config.accumulate < 1:
        raise UserError(f"accumulate={config.accumulate} is not possible: use 1 or more.")
    own, given = config.topology == topology.name and topology.slices == 1, _given()
    if not own:
        mesh = {axis: given[f"mesh.{axis}"] for axis in sharding.CONFIG_AXES if f"mesh.{axis}" in given}
        config.mesh = filled(mesh, topology.slices)
    sizes = sharding.mesh_shape(config.mesh, topology.chips)
    parts = sizes["data"] * sizes["fsdp"]
    config.batch_size = batch_size or -(-config.batch_size // (parts * config.accumulate)) * parts * config.accumulate
    if not own and "accumulate" not in given:
        saved = interface.find(config.task).perf.kept_activations(config) * COMPUTE_BYTES
        while config.batch_size // (parts * config.accumulate) * saved > topology.chip.hbm_bytes / 3:
            if config.batch_size % (2 * parts * config.accumulate):
                break
            config.accumulate *= 2
    return config


def filled(given: Mapping[str, int], slices: int = 1) -> dict[str, int]:
    """Sizes of a mesh of which some are given: `data` spans the slices, and `fsdp` takes what is left.

    Where `fsdp` is given, `data` takes it instead; where a -1 is given, that axis does.
    """
    sizes = {"data": slices, "fsdp": 1, "tensor": 1, **given}
    filling = next((axis for axis in ("fsdp", "data") if axis not in given), None)
    if filling and -1 not in sizes.values():
        sizes[filling] = -1
    return sizes


def _given() -> Mapping[str, Any]:
    """What --config.KEY=VALUE gave this program; nothing where it has no such flag."""
    return config_flags.get_override_values(flags.FLAGS["config"]) if "config" in flags.FLAGS else {}


class Plan:
    """A config on the devices of a slice: everything needed to compile, and no array.

    Args:
      config: as `fit` gives it.
      topology: the slice.

    Raises:
      UserError: if the config does not fit the slice.
    """

    def __init__(self, config: Config, topology: hardware.Topology):
        self.config, self.topology = config, topology
        self.task = interface.find(config.task)
        self.inputs = self.task.perf.inputs(config)
        self.mesh: Mesh = sharding.make_mesh(config.mesh, topology.devices())
        self.setup = (self.task.perf.setup or self.task.setup_abstract)(config)
        sharding.check_batch_size(config.batch_size, self.mesh, config.accumulate)
        self.task.check_mesh(self.setup, self.mesh)
        with jax.set_mesh(self.mesh):
            abstract = train_state.abstract(self.task.init_state, self.setup)
        self.layout = train_state.shardings(abstract, self.setup.networks, self.mesh)
        self.state = train_state.with_shardings(abstract, self.layout)

    def programs(self) -> Iterator[Program]:
        """The training steps, and what else the task has; each is traced where it is used."""
        batch = self.task.abstract_batch(self.setup, self.config.batch_size)
        batch = train_state.with_shardings(batch, dict.fromkeys(batch, sharding.batch_sharding(self.mesh)))
        steps = Steps(self.task, self.setup, self.mesh, self.layout)
        for phase in self.task.phases(self.setup):
            lower = functools.partial(steps.lower, phase, self.state, batch)
            flops = self.task.step_flops(self.setup, phase, batch)
            yield Program(phase, lower, flops, lambda: (self.state.trainable, self.state.frozen))
        yield from self.task.perf.programs(self.setup, self.mesh, self.state)

    def bound(self) -> dict[str, int]:
        """Least communication of a training step, bytes sent by a device: kind -> bytes.

        Parameters are gathered for the forward and for the backward pass (the token table for the first alone) and
        their gradients scattered, once each, in the compute dtype; frozen ones that are read are gathered once; `data`
        sums the gradients of each micro-batch, first within a slice and then what a device has of that sum between
        slices; `tensor` sums activations.
        """
        shape = self.mesh.shape
        fsdp, data, tensor = shape["fsdp"] * shape["fsdp_minor"], shape["data"], shape["tensor"]
        slices = self.topology.slices
        gathered = scattered = summed = crossing = 0.0

        def held(leaf: Any, where: Any) -> tuple[float, int]:
            """Bytes of a parameter that are gathered, and from how many parts."""
            names = {n for entry in where.spec for n in sharding.as_tuple(entry)}
            size = leaf.size * COMPUTE_BYTES / (tensor if "tensor" in names else 1)
            return size, fsdp if set(sharding.FSDP) & names else 1

        leaves = jax.tree_util.tree_leaves_with_path(self.state.trainable)
        for (path, leaf), where in zip(leaves, jax.tree.leaves(self.layout.trainable), strict=True):
            times = 1 if any(getattr(key, "key", None) == "embed" for key in path) else 2  # looked up, not multiplied
            size, parts = held(leaf, where)
            gathered += times * size * (parts - 1) / parts
            scattered += size * (parts - 1) / parts
            copies = data * fsdp / parts / slices  # in one slice
            summed += 2 * size / parts * (copies - 1) / copies
            crossing += 2 * size / parts / copies * (slices - 1) / slices
        accumulate = self.config.accumulate
        gathered, scattered = gathered * accumulate, scattered * accumulate
        for network, reads in self.task.perf.frozen_reads(self.setup).items():
            frozen = (jax.tree.leaves(tree.frozen[network]) for tree in (self.state, self.layout))
            for leaf, where, read in zip(*frozen, reads, strict=True):
                size, parts = held(leaf, where)
                gathered += read * size * (parts - 1) / parts
        bound = {"all-gather": gathered, "reduce-scatter": scattered, "all-reduce": summed}
        if slices > 1:
            bound[hlo.BETWEEN_SLICES] = crossing
        if tensor > 1:
            summed = self.task.perf.summed_activations(self.setup, self.config.batch_size // (data * fsdp))
            bound["all-reduce"] += 2 * COMPUTE_BYTES * summed * (tensor - 1) / tensor
        return {kind: round(value) for kind, value in bound.items()}

    def _widest(self, text: str) -> dict[str, int]:
        """Bytes of the largest arrays that a sequence's step must not have: scores of attention, float32 logits."""
        if self.task.perf.sequence is None:
            return {}
        length, vocabulary = self.task.perf.sequence(self.setup)
        shape = self.mesh.shape
        rows = self.config.batch_size // (shape["data"] * shape["fsdp"] * shape["fsdp_minor"] * self.config.accumulate)
        return {
            "attention_scores_bytes": traffic_lib.largest_square(text, length),
            "largest_float32_bytes": traffic_lib.largest(text, "f32"),
            "full_logits_bytes": 4 * rows * length * vocabulary // shape["tensor"],
        }

    def compile(
        self, program: Program, options: Mapping[str, str | bool] | None = None, effort: float = 0.0
    ) -> tuple[dict[str, Any], str]:
        """Compiles a program.

        Args:
          program: one of `programs`.
          options: options of the TPU compiler, besides those of the config (which are the training step's).
          effort: that it makes for the speed of the program, -1 to 1; programs of many convolutions compile in a tenth
            of the time with -1.

        Returns:
          (report: JSON values, see docs/scale.md; text of the optimized HLO)
        """
        training = program.trains
        options = {**(compiler_options(self.config.compiler_options, "tpu") if training else {}), **(options or {})}
        started = time.perf_counter()
        with jax.set_mesh(self.mesh):
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
        chip, devices = self.topology.chip, self.topology.chips
        moved = hlo.count(text)
        bound = self.bound() if training else {}
        flops = program.model_flops / devices
        sent = sum(total.bytes for total in moved.values())
        crossing = moved[hlo.BETWEEN_SLICES].bytes if hlo.BETWEEN_SLICES in moved else 0
        accessed = traffic_lib.hbm_bytes(text) if program.reads else 0
        if training:
            traffic = 2 * memory.argument_size_in_bytes + 2 * memory.temp_size_in_bytes
        else:
            traffic = accessed or memory.argument_size_in_bytes + memory.output_size_in_bytes
        estimate = {
            "compute": flops / chip.flops,
            "hbm": traffic / chip.hbm_bandwidth,
            "ici": (sent - crossing) / chip.ici_bandwidth,
        }
        if self.topology.slices > 1 and self.topology.generation in DCN_BANDWIDTH:
            estimate["dcn"] = crossing / DCN_BANDWIDTH[self.topology.generation]
        report = {
            "config": self.config.to_dict(),
            "program": program.name,
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "mesh": {a: sharding.mesh_shape(self.config.mesh, devices)[a] for a in sharding.CONFIG_AXES},
            "batch_size": self.config.batch_size,
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
            "largest_replicated_parameter_bytes": largest_replicated(program.parameters()),
            "roofline_estimate_seconds": {name: round(value, 6) for name, value in estimate.items()},
            "roofline_estimate_mfu": round(estimate["compute"] / max(max(estimate.values()), 1e-12), 4),
            "host_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "compiler_options": options,
            "compiler_effort": effort,
            "versions": versions(),
        }
        if training:
            report |= {"inputs": self.inputs, "frozen_parameters": train_state.count_params(self.state.frozen)}
            report |= self._widest(text)
        if program.reads:
            reads = program.reads()
            report |= {f"{name}_bytes": size for name, size in reads.items()}
            report["bytes_accessed"] = accessed
            report["accessed_over_read"] = round(accessed / sum(reads.values()), 4)
        return report, text


def largest_replicated(parameters: Any) -> int:
    """Bytes of the largest of some parameters that every device holds whole; 0 where there is one device."""
    held = (x for x in jax.tree.leaves(parameters) if x.sharding.num_devices > 1 and x.sharding.is_fully_replicated)
    return max((x.size * x.dtype.itemsize for x in held), default=0)


class OutOfMemory(UserError):
    """The compiler found no way to fit a program into the memory of the chip."""


def versions() -> dict[str, str]:
    """Of what decides a compilation."""
    import importlib.metadata

    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "libtpu": importlib.metadata.version("libtpu"),
    }
