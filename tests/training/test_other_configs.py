"""A run that goes on, or starts from another's parameters, with a config that is not the one it was trained with."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import event_log
from imagegpt_jax.training import loop, warm_start

_spec = importlib.util.spec_from_file_location("tiny_task", pathlib.Path(__file__).parents[1] / "tiny_task.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def happened(workdir, *kinds):
    return [e for e in event_log.read(workdir) if e["event"] in kinds]


def test_another_config_is_refused_unless_allowed(tmp_path):
    loop.run(tiny.Task(), tiny.make_config(steps=4), tmp_path)
    with pytest.raises(UserError, match=r"steps: 4 -> 8.*--allow_config_change"):
        loop.run(tiny.Task(), tiny.make_config(steps=8), tmp_path)
    loop.run(tiny.Task(), tiny.make_config(steps=4, log_every=2), tmp_path)  # harmless
    state = loop.run(tiny.Task(), tiny.make_config(steps=8), tmp_path, allow_changes=True)
    assert int(state.step) == 8
    assert happened(tmp_path, "start")[-1]["config_changes"] == ["steps: 4 -> 8"]


def test_warm_start_takes_the_averaged_parameters_and_nothing_else(tmp_path):
    first = loop.run(tiny.Task(), tiny.make_config(), tmp_path / "first")
    config = tiny.make_config(init_from=str(tmp_path / "first"), **{"checkpoint.every": 0})
    begun = []

    class Stop(Exception):
        pass

    class Watched(tiny.Task):
        def batches(self, setup, split, **settings):
            begun.append(settings["position"])
            raise Stop

    original = warm_start.load_params
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_params", lambda *args: begun.append(original(*args)) or begun[-1])
        with pytest.raises(Stop):
            loop.run(Watched(), config, tmp_path / "second")
    state, position = begun
    assert position == 0
    assert int(state.step) == 0
    assert_same(state.trainable, first.ema)
    (init,) = happened(tmp_path / "second", "init")
    assert (init["taken"], init["left"]) == (1, [])


class _Wider(tiny.Task):
    """A network with one more parameter, and the old one in another shape."""

    class Network(nnx.Module):
        def __init__(self, *, key):
            self.slope = nnx.Param(jnp.ones(4), axes=(None,))
            self.more = nnx.Param(jnp.ones(2), axes=(None,))

    def setup(self, config):
        network = train_state.network(lambda key: self.Network(key=key))
        return dataclasses.replace(super().setup(config), networks={"line": network})


def test_a_checkpoint_of_other_networks_is_told_with_what_differs(tmp_path):
    loop.run(tiny.Task(), tiny.make_config(steps=2), tmp_path)
    with pytest.raises(UserError) as e:
        loop.run(_Wider(), tiny.make_config(steps=4), tmp_path, allow_changes=True)
    said = str(e.value)
    assert "is of other networks than this config's" in said
    assert "ema/line/slope: (3,) there, (4,) here" in said
    assert "ema/line/more: nothing there, (2,) here" in said
    assert "--config.init_from=" in said
    assert checkpoint.steps(tmp_path) == [2]  # it is not damaged


def test_warm_start_lists_what_does_not_fit(tmp_path, capsys):
    loop.run(tiny.Task(), tiny.make_config(steps=2), tmp_path / "first")
    config = tiny.make_config(init_from=str(tmp_path / "first"), steps=2)
    with pytest.raises(UserError, match=r"line/slope: \(4,\) here, \(3,\) there; line/more: not in .*of this model"):
        loop.run(_Wider(), config, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    config = tiny.make_config(init_from=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no checkpoint"):
        loop.run(tiny.Task(), config, tmp_path / "third")
    assert not (tmp_path / "third").exists()
