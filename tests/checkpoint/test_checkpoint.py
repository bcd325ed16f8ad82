import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax.errors import UserError


class Tiny(nnx.Module):
    def __init__(self, *, key):
        self.layers = nnx.List(
            [nnx.Param(jax.random.normal(k, (2, 3)), axes=(None, None)) for k in jax.random.split(key)]
        )


NET = train_state.network(lambda key: Tiny(key=key))


def make(key, ema=("a",)):
    return train_state.init({"a": NET}, {"a": optax.adam(1e-3)}, {"n": jnp.ones(2)}, key, frozen=("layers/0",), ema=ema)


def make_config(every=1, keep=0, keep_every_hours=0.0, keep_best=""):
    policy = {"every": every, "keep": keep, "keep_every_hours": keep_every_hours, "keep_best": keep_best}
    return ConfigDict({"checkpoint": policy})


def save(workdir, steps, keep=0):
    checkpoints = checkpoint.Checkpoints(workdir, make_config(keep=keep))
    for step in steps:
        made = make(jax.random.key(step))
        checkpoints.save(step, made, position=step * 10)
    checkpoints.close()


def test_everything_comes_back(tmp_path):
    save(tmp_path, [1, 2])
    empty = jax.tree.map(jnp.zeros_like, make(jax.random.key(0)))
    restored, manifest = checkpoint.Checkpoints(tmp_path, make_config()).restore(empty)
    assert manifest.position == 20
    jax.tree.map(np.testing.assert_array_equal, restored, make(jax.random.key(2)))


def test_nothing_to_restore(tmp_path):
    assert checkpoint.Checkpoints(tmp_path, make_config()).restore(make(jax.random.key(0))) is None


def test_old_steps_are_removed(tmp_path):
    save(tmp_path, [1, 2, 3], keep=2)
    assert checkpoint.steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("ema", [("a",), ()])
def test_parameters_alone_are_read(tmp_path, ema):
    checkpoints = checkpoint.Checkpoints(tmp_path, make_config())
    made = make(jax.random.key(5), ema)
    if ema:
        made.ema["a"]["layers"][1] = made.ema["a"]["layers"][1] + 1
    checkpoints.save(5, made, position=0)
    checkpoints.close()
    abstract = jax.eval_shape(functools.partial(make, ema=ema), jax.random.key(0))
    params = checkpoint.load_params(tmp_path, abstract, "a")
    jax.tree.map(np.testing.assert_array_equal, params, made.eval_params("a"))


def test_missing_steps_are_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoint yet"):
        checkpoint.choose_step(tmp_path)
    save(tmp_path, [1, 2])
    with pytest.raises(UserError, match="no checkpoint of step 7: it has 1, 2"):
        checkpoint.choose_step(tmp_path, 7)
    assert checkpoint.choose_step(tmp_path) == 2


def test_last_step_is_always_due(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, make_config(every=4))
    assert [s for s in range(1, 11) if checkpoints.due(s, last=10)] == [4, 8, 10]
