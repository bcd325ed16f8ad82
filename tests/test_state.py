import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from imagegpt_jax import state


class Tiny(nnx.Module):
    def __init__(self, *, key):
        self.first = nnx.Param(jax.random.normal(key, (3, 4)), axes=("embed", "mlp"))
        self.layers = nnx.List([nnx.Param(jnp.ones(4), axes=(None,)) for _ in range(2)])

    def __call__(self, x):
        return x @ self.first[...] * self.layers[1][...]


def make():
    net = state.network(lambda key: Tiny(key=key))
    return net, state.init(
        {"a": net}, {"a": optax.adam(1e-3)}, {"n": jnp.zeros(())}, jax.random.key(0), frozen=("layers/0",), ema=("a",)
    )


def test_split_and_merge_are_inverse():
    module = Tiny(key=jax.random.key(1))
    graphdef, params = state.split(module)
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(state.merge(graphdef, params)(x), module(x))


def test_network_allocates_nothing_and_knows_axes():
    net = state.network(lambda key: Tiny(key=key))
    assert net.axes == {"first": ("embed", "mlp"), "layers": {0: (None,), 1: (None,)}}
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(net.abstract))


def test_frozen_paths_get_no_moments_and_no_average():
    net, made = make()
    assert set(made.trainable["a"]) == {"first", "layers"}
    assert set(made.trainable["a"]["layers"]) == {1}
    assert set(made.frozen["a"]["layers"]) == {0}
    assert set(made.ema["a"]["layers"]) == {1}
    assert jax.tree.structure(made.opt["a"][0].mu) == jax.tree.structure(made.trainable["a"])
    joined = made.params("a")
    assert set(joined["layers"]) == {0, 1}
    assert net.module(joined)(jnp.ones((1, 3))).shape == (1, 4)


def test_partition_and_join_are_inverse():
    params = {"a": {"b": 1, "c": 2}, "d": {0: {"e": 3}}}
    kept, held = state.partition(params, ["a/b", "^d/0"])
    assert kept == {"a": {"c": 2}}
    assert held == {"a": {"b": 1}, "d": {0: {"e": 3}}}
    assert state.join(kept, held) == params


def test_evaluation_takes_the_average():
    _, made = make()
    other = {**made.ema, "a": jax.tree.map(lambda x: x + 1, made.ema["a"])}
    import dataclasses

    changed = dataclasses.replace(made, ema=other)
    np.testing.assert_allclose(changed.eval_params("a")["first"], made.params("a")["first"] + 1)
    np.testing.assert_allclose(changed.params("a")["first"], made.params("a")["first"])
