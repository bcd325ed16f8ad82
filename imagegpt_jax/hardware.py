"""What accelerators can do: peak rates of chips, and the shapes of TPU slices.

Figures are the vendors' own for dense bf16 products and the whole chip; an estimate made from them is no measurement.
Sources: the Cloud TPU system architecture pages (v4, v5e, v5p, v6e) and NVIDIA's data sheets (SXM parts, no sparsity).
"""

import dataclasses
import math
import os
from typing import Any

from imagegpt_jax.cli import UserError, suggest

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      flops: peak of bf16 products, FLOP/s.
      hbm_bytes: memory.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s over all links to other chips of a slice (NVLink on GPUs), one way.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float


TPUS = {
    "v4": Chip(275e12, 32 * GIB, 1.228e12, 300e9),
    "v5e": Chip(197e12, 16 * GIB, 0.819e12, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1.640e12, 448e9),
}
GPUS = {
    "A100": Chip(312e12, 80 * GIB, 2.0e12, 300e9),
    "H100": Chip(989e12, 80 * GIB, 3.35e12, 450e9),
    "H200": Chip(989e12, 141 * GIB, 4.8e12, 450e9),
    "B200": Chip(2250e12, 180 * GIB, 8.0e12, 900e9),
    "L4": Chip(121e12, 24 * GIB, 0.3e12, 32e9),
}
# What JAX calls the devices of each generation.
_TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
              "TPU v6 lite": "v6e", "TPU v6e": "v6e"}  # fmt: skip
# Chips of a slice -> shape of its torus.
_SHAPES_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SHAPES_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
              1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device by JAX's `device_kind`; None for one that is not in the tables, such as a CPU."""
    if device_kind in _TPU_KINDS:
        return TPUS[_TPU_KINDS[device_kind]]
    return next((chip for name, chip in GPUS.items() if name in device_kind), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice, or several alike.

    Attributes:
      name: as given, such as "v5p-512".
      generation: "v4", "v5e", "v5p" or "v6e".
      shape: of the torus, such as "8x8x4".
      slices: number of slices.
    """

    name: str
    generation: str
    shape: str
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips, which is the number of JAX devices."""
        return math.prod(map(int, self.shape.split("x"))) * self.slices

    @property
    def chip(self) -> Chip:
        """What each can do."""
        return TPUS[self.generation]

    def devices(self) -> list[Any]:
        """Stand-ins of its devices, from the TPU compiler on this machine.

        Raises:
          UserError: if the compiler (libtpu) is not installed.
        """
        # Without these the library looks for the machine's TPUs, and complains that there are none.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{self.generation}-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling takes no device from anybody
        from jax.experimental import topologies

        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.generation == "v4":
            options["chip_config_name"] = "megacore"  # one device a chip, as Cloud TPU VMs run it
        try:
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.generation}:{self.shape}", **options
            )
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as e:
            raise UserError(
                f"the TPU compiler gives no topology {self.name} ({str(e).splitlines()[0]}):"
                " it comes with `pip install -e '.[tpu]'`."
            ) from e
        return list(description.devices)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Reads a name as Cloud gives it: v4-N and v5p-N count cores, two a chip; v5e-N and v6e-N count chips.

    Raises:
      UserError: for an unknown generation, or a size that there is no slice of.
    """
    generation, _, count = name.partition("-")
    if generation not in TPUS or not count.isdigit():
        raise UserError(
            f"unknown topology {name!r}: write v4-128, v5e-256, v5p-512, v6e-256.{suggest(generation, TPUS)}"
        )
    shapes, cores = (_SHAPES_3D, 2) if generation in ("v4", "v5p") else (_SHAPES_2D, 1)
    if slices < 1 or int(count) % cores or int(count) // cores not in shapes:
        known = ", ".join(f"{generation}-{chips * cores}" for chips in shapes)
        raise UserError(f"there is no slice {name} (x {slices}): sizes of {generation} are {known}.")
    return Topology(name, generation, shapes[int(count) // cores], slices)
