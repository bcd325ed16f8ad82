"""What accelerators can do: peak rates of chips, and slices of TPUs.

Figures are the vendors' own for dense bf16 products and the whole chip; an estimate made from them is no measurement.
Sources: the Cloud TPU system architecture pages (v4, v5e, v5p, v6e) and NVIDIA's data sheets (no sparsity; SXM parts
where there are several).
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from imagegpt_jax.errors import UserError

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
# Keys are words of what JAX calls the device: an H100 PCIe or NVL, for one, has other rates, and no row here.
GPUS = {
    "A100 40GB": Chip(312e12, 40 * GIB, 1.555e12, 300e9),
    "A100 80GB": Chip(312e12, 80 * GIB, 2.0e12, 300e9),
    "H100 HBM3": Chip(989e12, 80 * GIB, 3.35e12, 450e9),
    "H200": Chip(989e12, 141 * GIB, 4.8e12, 450e9),
    "B200": Chip(2250e12, 180 * GIB, 8.0e12, 900e9),
    "GB200": Chip(2500e12, 186 * GIB, 8.0e12, 900e9),
    "L4": Chip(121e12, 24 * GIB, 0.3e12, 32e9),
    "L40": Chip(181e12, 48 * GIB, 0.864e12, 32e9),
    "L40S": Chip(362e12, 48 * GIB, 0.864e12, 32e9),
}
# Words of a device that is a share of a GPU, or a card that is slower than the part of that name.
_OTHER_PARTS = {"GRID", "MIG", "NVL"}
# What JAX calls the devices of each generation.
_TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
              "TPU v6 lite": "v6e", "TPU v6e": "v6e"}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device by JAX's `device_kind`; None for one that is not in the tables, such as a CPU."""
    if device_kind in _TPU_KINDS:
        return TPUS[_TPU_KINDS[device_kind]]
    words = set(re.split(r"\W+", device_kind))
    if words & _OTHER_PARTS:
        return None
    return next((chip for name, chip in GPUS.items() if words.issuperset(name.split())), None)


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
          UserError: if the compiler (libtpu) is not installed, or does not know the slice.
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
        if self.shape == "1x1":
            options["chips_per_host_bounds"] = (1, 1, 1)  # a host has four chips by default
        try:
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.generation}:{self.shape}", **options
            )
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as e:
            if importlib.util.find_spec("libtpu") is None:
                raise UserError("the TPU compiler is not installed here: pip install -e '.[tpu]'.") from e
            raise UserError(f"the TPU compiler gives no topology {self.name}: {str(e).splitlines()[0]}") from e
        return list(description.devices)
