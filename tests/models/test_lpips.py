"""LPIPS at random weights: forward pass against its definition in NumPy, loading, and where gradients go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.pretrained import lpips
from imagegpt_jax.models.pretrained.lpips import LPIPS, MIN_SIZE


@functools.cache
def arrays(network):
    """Random weights of the right shapes; heads are positive, as the trained ones."""
    rng = np.random.default_rng(0)
    shapes = {
        n: p.shape for n, p in jax.eval_shape(lambda k: LPIPS(network, key=k), jax.random.key(0)).parameters().items()
    }

    def draw(name, shape):
        if name.startswith("heads"):
            return rng.uniform(0, 1, shape)
        return rng.normal(0, 1 / np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 0.1, shape)

    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}


@functools.cache
def model(network):
    made = jax.eval_shape(lambda k: LPIPS(network, key=k), jax.random.key(0))
    made.set_arrays(arrays(network), "test")
    return made


def pair(size, batch=1):
    return np.random.default_rng(1).uniform(-1, 1, (2, batch, size, size, 3)).astype(np.float32)


def conv(x, kernel, bias, stride, padding):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel, optimize=True) + bias


def pool(x, window):
    return np.lib.stride_tricks.sliding_window_view(x, (window, window), axis=(1, 2))[:, ::2, ::2].max((-1, -2))


def features(network, x):
    """The classifier written out layer by layer, in float64."""
    w = {n: a.astype(np.float64) for n, a in arrays(network).items()}
    x = (x.astype(np.float64) - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    taps = []
    if network == "alexnet":
        settings = [(4, 2, 0), (1, 2, 3), (1, 1, 3), (1, 1, 0), (1, 1, 0)]
        tapped = range(5)
    else:
        settings = [(1, 1, 2 if i in (2, 4, 7, 10) else 0) for i in range(13)]
        tapped = (1, 3, 6, 9, 12)
    for i, (stride, padding, window) in enumerate(settings):
        x = pool(x, window) if window else x
        x = np.maximum(conv(x, w[f"convs.{i}.kernel"], w[f"convs.{i}.bias"], stride, padding), 0)
        if i in tapped:
            taps.append(x)
    return taps


@pytest.mark.parametrize("network", ["alexnet", "vgg16"])
def test_distance_follows_the_definition(network):
    a, b = pair(MIN_SIZE[network] + 4)
    expected = 0
    for i, (fa, fb) in enumerate(zip(features(network, a), features(network, b), strict=True)):
        unit_a, unit_b = (f / (np.linalg.norm(f, axis=-1, keepdims=True) + 1e-10) for f in (fa, fb))
        expected = expected + ((unit_a - unit_b) ** 2 * arrays(network)[f"heads.{i}"]).sum(-1).mean((1, 2))
    np.testing.assert_allclose(jax.jit(model(network))(a, b), expected, rtol=1e-4)


def test_distance_is_symmetric_per_image_and_zero_for_equal_images():
    a, b = pair(31, batch=2)
    distance = jax.jit(model("alexnet"))
    np.testing.assert_array_equal(distance(a, a), [0, 0])
    np.testing.assert_allclose(distance(a, b), distance(b, a), rtol=1e-6)
    mixed = distance(a, np.stack([a[0], b[1]]))
    assert mixed[0] == 0
    assert mixed[1] == pytest.approx(float(distance(a, b)[1]), rel=1e-5)


def test_gradients_reach_images_only():
    a, b = pair(31)

    @jax.jit
    def gradients(network, a):
        return jax.grad(lambda network, a: network(a, b).sum(), argnums=(0, 1))(network, a)

    to_network, to_image = gradients(model("alexnet"), a)
    assert all(not jnp.any(g) for g in jax.tree.leaves(to_network))
    assert jnp.any(to_image != 0)


def test_gradient_is_finite_where_all_features_are_off():
    def loss(x):
        return jnp.sum(jnp.square(lpips._unit(jax.nn.relu(x)) - 0.5))

    assert np.all(np.isfinite(jax.grad(loss)(-jnp.ones((1, 1, 1, 4)))))


@pytest.mark.parametrize("network", ["alexnet", "vgg16"])
def test_min_size_is_the_least_that_works(network):
    shape = (1, MIN_SIZE[network], MIN_SIZE[network], 3)
    taps = jax.eval_shape(model(network)._features, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert taps[-1].shape[1:3] == (1, 1)
    small = jnp.zeros((1, MIN_SIZE[network] - 1, 64, 3))
    with pytest.raises(UserError, match="too small"):
        model(network)(small, small)


def test_load_reads_what_the_converter_writes(tmp_path):
    path = tmp_path / "alexnet.safetensors"
    safetensors.numpy.save_file(arrays("alexnet"), path)
    loaded = LPIPS.load(path)
    assert loaded.network == "alexnet"
    for name, param in loaded.parameters().items():
        np.testing.assert_array_equal(param[...], arrays("alexnet")[name])


def test_load_explains_what_is_wrong(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match=r"python tools/convert_lpips.py --network=vgg16 --output=.*weights"):
        LPIPS.load(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        LPIPS.load(path)
    safetensors.numpy.save_file({"other": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match="does not hold LPIPS weights"):
        LPIPS.load(path)
    wrong = {**arrays("alexnet"), "heads.0": np.zeros(3, np.float32), "extra": np.zeros(1, np.float32)}
    del wrong["convs.1.bias"]
    safetensors.numpy.save_file(wrong, path)
    with pytest.raises(UserError, match=r"convs.1.bias is missing; extra is unknown; heads.0 is \(3,\), not \(64,\)"):
        LPIPS.load(path)


def test_unknown_network_gets_a_suggestion():
    with pytest.raises(UserError, match="'vgg16'"):
        LPIPS("vgg19", key=jax.random.key(0))
