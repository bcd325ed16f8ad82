import pytest

from imagegpt_jax import hardware
from imagegpt_jax.cli import UserError


@pytest.mark.parametrize(
    ("name", "shape", "chips"),
    [("v4-128", "4x4x4", 64), ("v5e-16", "4x4", 16), ("v5e-256", "16x16", 256), ("v5p-128", "4x4x4", 64),
     ("v5p-512", "4x8x8", 256), ("v6e-256", "16x16", 256)],
)  # fmt: skip
def test_names_are_cloud_s(name, shape, chips):
    topology = hardware.parse_topology(name)
    assert (topology.shape, topology.chips) == (shape, chips)
    assert hardware.parse_topology(name, slices=2).chips == 2 * chips


def test_unknown_slices_are_named():
    with pytest.raises(UserError, match="Did you mean 'v5"):
        hardware.parse_topology("v5-16")
    with pytest.raises(UserError, match="v5e-16, v5e-32"):
        hardware.parse_topology("v5e-17")
    with pytest.raises(UserError, match="no slice v5p-127"):
        hardware.parse_topology("v5p-127")


def test_chips_are_found_by_what_jax_calls_them():
    assert hardware.chip_of("TPU v5 lite") is hardware.TPUS["v5e"]
    assert hardware.chip_of("TPU v5") is hardware.TPUS["v5p"]
    assert hardware.chip_of("NVIDIA H100 80GB HBM3") is hardware.GPUS["H100"]
    assert hardware.chip_of("cpu") is None
