import importlib.util

import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import hardware


@pytest.mark.parametrize("installed", [True, False])
def test_installing_the_compiler_is_the_remedy_only_where_it_is_missing(monkeypatch, installed):
    from jax.experimental import topologies

    def refuse(**options):
        raise RuntimeError("INVALID_ARGUMENT: no such thing")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    with pytest.raises(UserError, match="v5e-16.*no such thing" if installed else "pip install") as e:
        hardware.Topology("v5e-16", "v5e", "4x4").devices()
    assert ("pip" in str(e.value)) != installed


def test_chips_are_found_by_what_jax_calls_them():
    assert hardware.chip_of("TPU v5 lite") is hardware.TPUS["v5e"]
    assert hardware.chip_of("TPU v5") is hardware.TPUS["v5p"]
    assert hardware.chip_of("cpu") is None


@pytest.mark.parametrize(
    ("kind", "tflops", "gib"),
    [("NVIDIA A100-SXM4-40GB", 312, 40), ("NVIDIA A100-PCIE-40GB", 312, 40), ("NVIDIA A100-SXM4-80GB", 312, 80),
     ("NVIDIA A100 80GB PCIe", 312, 80), ("NVIDIA H100 80GB HBM3", 989, 80), ("NVIDIA H200", 989, 141),
     ("NVIDIA B200", 2250, 180), ("NVIDIA GB200", 2500, 186), ("NVIDIA L4", 121, 24), ("NVIDIA L40", 181, 48),
     ("NVIDIA L40S", 362, 48)],
)  # fmt: skip
def test_gpus_are_found_by_whole_words(kind, tflops, gib):
    chip = hardware.chip_of(kind)
    assert chip is not None
    assert (chip.flops, chip.hbm_bytes) == (tflops * 1e12, gib * hardware.GIB)


@pytest.mark.parametrize(
    "kind",
    ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA A100X",
     "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "GRID A100D-80GB", "NVIDIA GeForce RTX 4090"],
)  # fmt: skip
def test_no_rate_is_made_up_for_other_gpus(kind):
    assert hardware.chip_of(kind) is None
