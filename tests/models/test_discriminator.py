"""PatchGAN: published size and receptive field, normalisation by the batch, sizes for small images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagegpt_jax.errors import UserError
from imagegpt_jax.models import discriminator
from imagegpt_jax.models.discriminator import BatchNorm, Discriminator, DiscriminatorConfig
from imagegpt_jax.models.style_discriminator import EqualConv, batch_deviation, blur


def key(i=0):
    return jax.random.key(i)


def make(**settings):
    return Discriminator(DiscriminatorConfig(**{"base_width": 8, "norm_groups": 4, **settings}), key=key())


def test_defaults_are_vqgans_discriminator():
    model = jax.eval_shape(lambda k: Discriminator(DiscriminatorConfig(), key=k), key())
    # The sum over taming-transformers' NLayerDiscriminator(input_nc=3, ndf=64, n_layers=3) with BatchNorm.
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == 2_765_633
    assert [layer.kernel.shape[-1] for layer in model.convs] == [64, 128, 256, 512, 1]
    image = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    assert jax.eval_shape(lambda model, x: model(x), model, image).shape == (2, 30, 30)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34)])
def test_each_logit_judges_one_patch(layers, patch):
    model = make(num_layers=layers, norm="none")
    x = jax.random.normal(key(1), (1, 64, 64, 3))
    middle = jax.eval_shape(model, x).shape[1] // 2
    gradient = jax.jit(jax.grad(lambda x: model(x)[0, middle, middle]))(x)
    rows = np.flatnonzero(np.any(np.asarray(gradient)[0] != 0, axis=(1, 2)))
    assert rows[-1] - rows[0] + 1 == patch


def test_batch_norm_uses_the_statistics_of_the_batch():
    norm = BatchNorm(3)
    norm.scale[...], norm.bias[...] = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 2.0])
    x = np.asarray(4 * jax.random.normal(key(1), (5, 4, 6, 3)) + 2)
    expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5) * [1, 2, 3] + [0, 1, 2]
    np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-5)


def test_only_batch_norm_ties_images_together():
    x = jax.random.normal(key(1), (2, 16, 16, 3))
    changed = x.at[1].multiply(3.0)
    for norm, tied in (("batch", True), ("group", False), ("none", False)):
        model = jax.jit(make(num_layers=1, norm=norm))
        assert bool(jnp.any(jnp.abs(model(x)[0] - model(changed)[0]) > 1e-6)) == tied


def test_convolutions_before_batch_norm_have_no_bias():
    assert [layer.bias is None for layer in make(norm="batch").convs] == [False, True, True, True, False]
    assert not any(layer.bias is None for layer in make(norm="group").convs)


def test_initial_kernels_are_small():
    assert float(jnp.std(make().convs[2].kernel[...])) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_smallest_image_leaves_one_logit(layers):
    model = make(num_layers=layers)
    size = model.config.min_size
    assert jax.eval_shape(model, jnp.zeros((2, size, size, 3))).shape == (2, 1, 1)
    with pytest.raises(UserError, match=f"at least {size} pixels"):
        model(jnp.zeros((2, size, size - 1, 3)))


def test_logits_are_float32_in_half_precision():
    model = make(num_layers=1, dtype="bfloat16")
    assert jax.eval_shape(model, jnp.zeros((1, 8, 8, 3))).dtype == jnp.float32


def test_mistakes_in_the_config_are_explained():
    with pytest.raises(UserError, match="'batch'"):
        DiscriminatorConfig(norm="batchnorm")
    with pytest.raises(UserError, match="num_layers=0"):
        DiscriminatorConfig(num_layers=0)


# ------------------------------------------------------------------------------------------------------ StyleGAN2


def style(**settings):
    config = {"kind": "style", "base_width": 4, "max_width": 8, "image_size": 16, "deviation_group": 2, **settings}
    return discriminator.make(DiscriminatorConfig(**config), key=key())


@pytest.mark.parametrize(("size", "width", "count"), [(1024, 32, 29_012_513), (256, 128, 28_864_129)])
def test_style_discriminator_has_the_published_size(size, width, count):
    """StyleGAN2's config F at 1024 pixels, and the same channels at 256."""
    config = DiscriminatorConfig(kind="style", base_width=width, image_size=size)
    model = jax.eval_shape(lambda k: discriminator.make(config, key=k), key())
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == count
    image = jax.ShapeDtypeStruct((4, size, size, 3), jnp.float32)
    assert jax.eval_shape(lambda model, x: model(x), model, image).shape == (4, 1, 1)


def test_blur_keeps_a_constant_and_sums_four_taps():
    x = jnp.zeros((1, 9, 9, 2)).at[0, 4, 4, 1].set(64.0)
    taps = np.array([1, 3, 3, 1])
    np.testing.assert_allclose(blur(x, 0)[0, 1:5, 1:5, 1], np.outer(taps, taps)[::-1, ::-1], rtol=1e-6)
    assert not np.any(blur(x, 0)[..., 0])
    np.testing.assert_allclose(blur(jnp.ones((1, 8, 8, 1)), 0, 2), 1, rtol=1e-6)


def test_deviation_is_that_of_each_group_of_the_batch():
    x = np.asarray(jax.random.normal(key(1), (6, 4, 4, 3)))
    got = np.asarray(batch_deviation(jnp.asarray(x), 2))
    np.testing.assert_array_equal(got[..., :3], x)
    expected = np.sqrt(x.reshape(3, 2, 4, 4, 3).var(axis=1) + 1e-8).mean((1, 2, 3))
    np.testing.assert_allclose(got[:, 1, 2, 3], np.repeat(expected, 2), rtol=1e-5)


def test_scaled_weights_and_gained_activations_keep_the_variance():
    layer = EqualConv(64, 64, 3, dtype="float32", param_dtype="float32", key=key())
    x = jax.random.normal(key(1), (2, 8, 8, 64))
    assert float(jnp.mean(jnp.square(layer(x)[:, 1:-1, 1:-1]))) == pytest.approx(1.04, rel=0.1)


def test_style_discriminator_needs_a_power_of_two():
    for size in (0, 4, 24):
        with pytest.raises(UserError, match="power of two"):
            DiscriminatorConfig(kind="style", image_size=size)
    with pytest.raises(UserError, match="24 x 16"):
        jax.eval_shape(style(), jnp.zeros((2, 24, 16, 3)))
    with pytest.raises(UserError, match="'patch'"):
        DiscriminatorConfig(kind="patches")
