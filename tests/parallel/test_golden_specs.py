"""Every parameter of every preset is sharded as pinned. Changed on purpose? `python tools/golden/update_golden.py`."""

import json
import pathlib

import pytest

from imagegpt_jax.config import sibling

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools" / "golden"
update_golden = sibling(str(TOOLS / "x.py"), "update_golden.py")
GOLDEN = json.loads(update_golden.GOLDEN.read_text())


@pytest.fixture(scope="module")
def specs():
    return update_golden.specs()


def test_every_preset_is_pinned(specs):
    assert set(specs) == set(GOLDEN)


@pytest.mark.parametrize("preset", GOLDEN)
def test_parameters_are_cut_as_pinned(specs, preset):
    assert specs[preset]["mesh"] == GOLDEN[preset]["mesh"]
    moved = {k: (v, specs[preset]["params"].get(k)) for k, v in GOLDEN[preset]["params"].items()}
    assert {k: v for k, v in moved.items() if v[0] != v[1]} == {}
    assert set(specs[preset]["params"]) == set(GOLDEN[preset]["params"])


def test_large_presets_cut_every_matrix(specs):
    params = specs["decoder 20B"]["params"]
    assert all("fsdp+fsdp_minor" in spec for name, spec in params.items() if "weight" in name)
