import importlib.util
import pathlib

import pytest

from imagegpt_jax.config import sibling
from imagegpt_jax.errors import UserError

TOOLS = pathlib.Path(__file__).resolve().parents[3] / "tools"
topologies = sibling(str(TOOLS / "scale" / "x.py"), "topologies.py")


@pytest.mark.parametrize(
    ("name", "shape", "chips"),
    [("v4-128", "4x4x4", 64), ("v5e-16", "4x4", 16), ("v5e-256", "16x16", 256), ("v5p-128", "4x4x4", 64),
     ("v5p-512", "4x8x8", 256), ("v6e-256", "16x16", 256)],
)  # fmt: skip
def test_names_are_cloud_s(name, shape, chips):
    topology = topologies.parse_topology(name)
    assert (topology.shape, topology.chips) == (shape, chips)
    assert topologies.parse_topology(name, slices=2).chips == 2 * chips


def test_v5e_has_the_name_that_cloud_s_commands_take():
    assert topologies.parse_topology("v5litepod-16") == topologies.parse_topology("v5e-16")


@pytest.mark.parametrize(
    ("name", "shape"),
    # As in google's xpk, src/xpk/core/system_characteristics.py, and the TPU v4 and v5p pages.
    [("v4-8", "2x2x1"), ("v4-384", "4x4x12"), ("v4-1536", "8x8x12"), ("v4-8192", "16x16x16"), ("v5p-64", "2x4x4"),
     ("v5p-384", "4x4x12"), ("v5p-640", "4x4x20"), ("v5p-768", "4x8x12"), ("v5p-1024", "8x8x8"),
     ("v5p-1152", "4x12x12"), ("v5p-1536", "8x8x12"), ("v5p-2304", "8x12x12"), ("v5p-7808", "4x4x244"),
     ("v5p-9216", "12x16x24"), ("v5p-10368", "12x12x36"), ("v5p-12288", "16x16x24")],
)  # fmt: skip
def test_large_slices_are_of_cubes_and_as_near_to_a_cube_as_can_be(name, shape):
    assert topologies.parse_topology(name).shape == shape


def test_unknown_slices_are_named():
    with pytest.raises(UserError, match="Did you mean 'v5"):
        topologies.parse_topology("v5-16")
    with pytest.raises(UserError, match="v5e-16 and v5e-32"):
        topologies.parse_topology("v5e-17")
    with pytest.raises(UserError, match="no slice v5p-127: .* v5p-64 and v5p-128"):
        topologies.parse_topology("v5p-127")
    with pytest.raises(UserError, match="no slice v5p-8576: .* v5p-8448 and v5p-8704"):
        topologies.parse_topology("v5p-8576")
    with pytest.raises(UserError, match="no slice v5p-14000: .* v5p-12288"):
        topologies.parse_topology("v5p-14000")
    with pytest.raises(UserError, match="0 slices"):
        topologies.parse_topology("v5e-16", slices=0)


@pytest.mark.parametrize("name", ["v5e", "v5e-", "v5litepod", "v5e-4x4"])
def test_a_generation_without_a_size_is_told_so(name):
    with pytest.raises(UserError, match=f"{name}' has no size: write v5e-N"):
        topologies.parse_topology(name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
@pytest.mark.parametrize(("name", "slices"), [("v5e-1", 1), ("v6e-1", 1), ("v6e-1", 2), ("v5e-4", 1), ("v5p-384", 1)])
def test_the_compiler_knows_the_slices(name, slices):
    topology = topologies.parse_topology(name, slices)
    assert len(topology.devices()) == topology.chips
