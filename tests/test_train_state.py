import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from imagegpt_jax import train_state
from imagegpt_jax.errors import UserError
from imagegpt_jax.parallel import sharding


class Tiny(nnx.Module):
    def __init__(self, *, key):
        self.first = nnx.Param(jax.random.normal(key, (3, 4)), axes=("embed", "mlp"))
        self.layers = nnx.List([nnx.Param(jnp.ones(4), axes=(None,)) for _ in range(2)])

    def __call__(self, x):
        return x @ self.first[...] * self.layers[1][...]


def make():
    net = train_state.network(lambda key: Tiny(key=key))
    return net, train_state.init(
        {"a": net}, {"a": optax.adam(1e-3)}, {"n": jnp.zeros(())}, jax.random.key(0), frozen=("layers/0",), ema=("a",)
    )


def test_split_and_merge_are_inverse():
    module = Tiny(key=jax.random.key(1))
    graphdef, params = train_state.split(module)
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(train_state.merge(graphdef, params)(x), module(x))


def test_network_allocates_nothing_and_knows_axes():
    net = train_state.network(lambda key: Tiny(key=key))
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
    kept, held = train_state.partition(params, ["a/b", "^d/0"])
    assert kept == {"a": {"c": 2}}
    assert held == {"a": {"b": 1}, "d": {0: {"e": 3}}}
    assert train_state.join(kept, held) == params


def test_a_pattern_that_is_none_is_told():
    with pytest.raises(UserError, match=r"config.frozen has '\(', which is no regular expression"):
        train_state.partition({"a": 1}, ["("])


def test_evaluation_takes_the_average():
    _, made = make()
    other = {**made.ema, "a": jax.tree.map(lambda x: x + 1, made.ema["a"])}
    import dataclasses

    changed = dataclasses.replace(made, ema=other)
    np.testing.assert_allclose(changed.eval_params("a")["first"], made.params("a")["first"] + 1)
    np.testing.assert_allclose(changed.params("a")["first"], made.params("a")["first"])


class Stacked(nnx.Module):
    """Two matrices of more than 1 MiB, the first of 24 stacked layers."""

    def __init__(self, *, key):
        del key
        self.layers = nnx.Param(jnp.zeros((24, 256, 256)), axes=("embed", "mlp"))
        self.table = nnx.Param(jnp.zeros((840, 520)), axes=("vocab", "embed"))


@pytest.mark.parametrize(
    ("fsdp", "minor", "tensor", "use"),
    [
        (48, 6, 1, 8),  # the layers' 24 are never cut, and 16 divides 256 and neither 840 nor 520
        (24, 4, 1, 8),
        (3, 1, 1, 1),
        (48, 6, 2, 8),
        (128, 8, 1, 8),  # 64 does as 8 x 8, of which 840 takes one and 520 the other, and not as 64 x 1
    ],
)
def test_a_size_of_fsdp_that_is_named_cuts_every_large_parameter(fsdp, minor, tensor, use):
    networks = {"a": train_state.network(lambda key: Stacked(key=key))}

    def check(fsdp, minor):
        mesh = jax.sharding.AbstractMesh((1, fsdp // minor, minor, tensor), sharding.MESH_AXES)
        train_state.check_layout(networks, mesh)

    with pytest.raises(UserError, match=f" of the a, .* mesh.fsdp={fsdp}: use mesh.fsdp={use} and put the rest"):
        check(fsdp, minor)
    for split in sharding.minor_sizes(use):
        check(use, split)
