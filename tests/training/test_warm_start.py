"""Parameters of another run in a new one, whatever the networks; for errors see `test_config_checks.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import event_log
from imagegpt_jax.training import warm_start


class Tiny(nnx.Module):
    def __init__(self, *, key):
        self.layers = nnx.List(
            [nnx.Param(jax.random.normal(k, (2, 3)), axes=(None, None)) for k in jax.random.split(key)]
        )


NET = train_state.network(lambda key: Tiny(key=key))


def make(seed, frozen):
    return train_state.init({"a": NET}, {"a": optax.adam(1e-3)}, {}, jax.random.key(seed), frozen=frozen, ema=("a",))


def make_config(**changes):
    policy = {"every": 1, "keep": 0, "keep_every_hours": 0.0, "keep_best": ""}
    return ConfigDict({"checkpoint": policy, "init_from": "", "init_partial": False, **changes})


def save(workdir, frozen, steps=(1,)):
    """Checkpoints of other parameters, whose averages are others again; returns those to begin with."""
    checkpoints = checkpoint.Checkpoints(workdir, make_config())
    expected = None
    for step in steps:
        made = make(step, frozen)
        made.ema["a"] = jax.tree.map(lambda x: x + 1, made.trainable["a"])
        checkpoints.save(step, made, position=0)
        expected = made.eval_params("a")
    checkpoints.close()
    return expected


@pytest.mark.parametrize("there", [(), ("layers/0",), ("layers/1",)])
@pytest.mark.parametrize("here", [(), ("layers/0",)])
def test_what_is_frozen_is_taken_too(here, there, tmp_path):
    expected = save(tmp_path, there)
    begun = make(9, here)
    config = make_config(init_from=str(tmp_path))
    warm_start.check({"a": NET}, config, ("a", "tokenizer"))
    loaded = warm_start.load_params(begun, config, ("a", "tokenizer"), event_log.Log(None))
    jax.tree.map(np.testing.assert_array_equal, loaded.params("a"), expected)
    jax.tree.map(np.testing.assert_array_equal, loaded.ema["a"], loaded.trainable["a"])
    assert jax.tree.structure(loaded) == jax.tree.structure(begun)


def test_a_check_falls_back_with_the_run_that_is_loaded(tmp_path, capsys):
    save(tmp_path, (), steps=(1, 2))
    for file in (tmp_path / "checkpoints" / "2" / "state").glob("_*"):
        file.unlink()
    config = make_config(init_from=str(tmp_path))
    warm_start.check({"a": NET}, config, ("a", "tokenizer"))
    assert "step 2 is damaged" in capsys.readouterr().err
    (tmp_path / "checkpoints" / "1" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        warm_start.check({"a": NET}, config, ("a", "tokenizer"))


def test_nothing_that_fits_is_nothing_to_begin_with(tmp_path):
    class Wide(nnx.Module):
        def __init__(self, *, key):
            self.layers = nnx.List([nnx.Param(jnp.ones(5), axes=(None,))])

    save(tmp_path, ())
    config = make_config(init_from=str(tmp_path), init_partial=True)
    with pytest.raises(UserError, match=r"a/layers/0: \(5,\) here, \(2, 3\) there") as e:
        warm_start.check({"a": train_state.network(lambda key: Wide(key=key))}, config, ("a", "tokenizer"))
    assert "init_partial" not in str(e.value)
