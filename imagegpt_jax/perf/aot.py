"""The programs of a config for TPU slices that are not there, ready to compile, and the least that they communicate."""

import functools
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
from imagegpt_jax.runtime import hardware
from imagegpt_jax.tasks import interface
from imagegpt_jax.tasks.interface import Program
from imagegpt_jax.training.steps import Steps

COMPUTE_BYTES = 2  # of parameters and activations on the way: bf16


def fit(config: Config, topology: hardware.Topology, batch_size: int = 0) -> Config:
    """A copy of a config for a slice. On one it was not written for, `fsdp` fills, and `accumulate` doubles until the
    inputs of blocks that the backward pass keeps should take no more than a third of the memory. What the command line
    gave of these (`--config.mesh.tensor=2`, `--config.accumulate=1`) stays.

    A `batch_size` of 0 takes the config's, rounded up to a multiple of the devices. Raises UserError for an
    `accumulate` below 1, or a mesh of the command line that does not fit the slice.
    """
    config = ConfigDict(config.to_dict())
    if config.accumulate < 1:
        raise UserError(f"accumulate={config.accumulate} is not possible: use 1 or more.")
    own = config.topology == topology.name and topology.slices == 1
    given = config_flags.get_override_values(flags.FLAGS["config"]) if "config" in flags.FLAGS else {}
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


class Plan:
    """A config, as `fit` gives it, on the devices of a slice: everything needed to compile, and no array.

    Raises UserError if the config does not fit the slice.
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


def largest_replicated(parameters: Any) -> int:
    """Bytes of the largest of some parameters that every device holds whole; 0 where there is one device."""
    held = (x for x in jax.tree.leaves(parameters) if x.sharding.num_devices > 1 and x.sharding.is_fully_replicated)
    return max((x.size * x.dtype.itemsize for x in held), default=0)
