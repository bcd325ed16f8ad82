"""No damage to a checkpoint comes back as if nothing were."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from imagegpt_jax import checkpoint
from imagegpt_jax.checkpoint import manifest
from imagegpt_jax.errors import UserError


@pytest.fixture
def mutate(load_tool):
    return load_tool("robustness/mutate.py")


def test_a_hundred_damaged_checkpoints_and_none_silently_wrong(mutate):
    report = mutate.campaign(100, seed=1)
    assert report["unexpected"] == []
    outcomes = {o: sum(kind.get(o, 0) for kind in report["outcomes"].values()) for o in ("fell back", "refused")}
    assert sum(outcomes.values()) == 100
    assert min(outcomes.values()) > 0


def test_without_verification_a_flipped_bit_comes_back_as_if_nothing_were(mutate, tmp_path, monkeypatch):
    """The control: what the manifest is for."""
    config = ConfigDict({"checkpoint": {"every": 1, "keep": 0, "keep_every_hours": 0.0, "keep_best": ""}})
    state = mutate.make_state(1, "float32")
    checkpoints = checkpoint.Checkpoints(tmp_path, config)
    checkpoints.save(1, state, position=1)
    checkpoints.wait()
    file = max((tmp_path / "checkpoints" / "1" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "verify", lambda *args: None)
        restored, _ = checkpoints.restore(state)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), restored, state)
    assert not all(jax.tree.leaves(same))
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.restore(state)
    checkpoints.close()
