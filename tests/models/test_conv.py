"""Convolutions against the definition in float64, normalisation and attention against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.models import conv, winograd


def key(i=0):
    return jax.random.key(i)


def normal(i, *shape):
    return np.asarray(jax.random.normal(key(i), shape))


def direct(x_BHWC, w_kkCO, stride=1, padding=(1, 1)):
    """Convolution by its definition, in float64."""
    x = np.pad(x_BHWC.astype(np.float64), ((0, 0), padding, padding, (0, 0)))
    k = w_kkCO.shape[0]
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, w_kkCO.astype(np.float64))


def apply(layer, x):
    """A layer's output, compiled whole: one by one, its operations take far longer to compile."""
    return jax.jit(lambda layer, x: layer(x))(layer, x)


def relative_error(got, expected):
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


def test_winograd_is_the_convolution():
    x, w = normal(0, 2, 8, 12, 33), normal(1, 3, 3, 33, 20)
    assert relative_error(jax.jit(winograd.conv3x3)(x, w), direct(x, w)) < 5e-6


def test_winograd_gradients_are_the_convolutions():
    x, w, dy = normal(0, 2, 8, 4, 6), normal(1, 3, 3, 6, 5), normal(2, 2, 8, 4, 5)
    dx, dw = jax.jit(lambda x, w, dy: jax.vjp(winograd.conv3x3, x, w)[1](dy))(x, w, dy)
    # The convolution is bilinear, so its gradients are convolutions: of dy by the flipped kernel, of x by dy.
    assert relative_error(dx, direct(dy, w[::-1, ::-1].swapaxes(2, 3))) < 5e-6
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = [[np.einsum("bhwc,bhwo->co", padded[:, i : i + 8, j : j + 4], dy) for j in range(3)] for i in range(3)]
    assert relative_error(dw, np.array(expected)) < 5e-6


def test_winograd_has_second_derivatives():
    x, w = normal(0, 1, 4, 4, 3), 0.3 * normal(1, 3, 3, 3, 4)

    def penalty(layer):
        def squared_gradient(w):
            return jnp.sum(jnp.square(jax.grad(lambda x: jnp.sum(jnp.tanh(layer(x, w))))(x)))

        return jax.jit(jax.grad(squared_gradient))(w)

    def xla(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert relative_error(penalty(winograd.conv3x3), np.asarray(penalty(xla))) < 1e-5


def uses_xla_convolution(layer, x):
    return "conv_general_dilated" in str(jax.make_jaxpr(lambda x: layer(x))(x))


def test_conv_implementations_differ_and_agree():
    x = normal(0, 2, 8, 8, 32)
    layers = {impl: conv.Conv(32, 32, impl=impl, key=key(1)) for impl in ("xla", "winograd", "auto")}
    assert [uses_xla_convolution(layers[i], x) for i in ("xla", "winograd", "auto")] == [True, False, False]
    outputs = {impl: np.asarray(apply(layer, x)) for impl, layer in layers.items()}
    assert relative_error(outputs["winograd"], outputs["xla"]) < 1e-5
    np.testing.assert_array_equal(outputs["winograd"], outputs["auto"])


@pytest.mark.parametrize(("size", "stride", "padding"), [(6, 1, None), (8, 2, (0, 1))])
def test_conv_falls_back_where_winograd_does_not_apply(size, stride, padding):
    layer = conv.Conv(5, 7, stride=stride, padding=padding, impl="winograd", key=key())
    layer.bias[...] = jnp.arange(7.0)
    x = normal(1, 2, size, size, 5)
    assert uses_xla_convolution(layer, x)
    expected = direct(x, np.asarray(layer.kernel[...]), stride, padding or (1, 1)) + np.arange(7.0)
    assert relative_error(apply(layer, x), expected) < 1e-6


def test_auto_leaves_narrow_and_half_precision_layers_to_xla():
    assert uses_xla_convolution(conv.Conv(3, 32, key=key()), normal(0, 1, 8, 8, 3))
    assert uses_xla_convolution(conv.Conv(32, 32, dtype="bfloat16", key=key()), normal(0, 1, 8, 8, 32))


def test_pointwise_conv_is_a_matrix_product():
    layer = conv.Conv(5, 7, 1, key=key())
    x = normal(1, 2, 3, 3, 5)
    assert not uses_xla_convolution(layer, x)
    np.testing.assert_allclose(layer(x), x @ np.asarray(layer.kernel[0, 0]), rtol=1e-5, atol=1e-6)


def test_unknown_conv_impl_gets_a_suggestion():
    with pytest.raises(UserError, match="winograd"):
        conv.Conv(3, 3, impl="winogard", key=key())


def test_group_norm_follows_its_formula():
    norm = conv.GroupNorm(12, 3)
    norm.scale[...], norm.bias[...] = jnp.arange(12.0), jnp.arange(12.0) - 4
    x = 3 * normal(0, 2, 4, 5, 12) + 5
    groups = x.astype(np.float64).reshape(2, 4, 5, 3, 4)
    mean, variance = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * np.arange(12.0) + np.arange(12.0) - 4
    np.testing.assert_allclose(apply(norm, x), expected, rtol=1e-4, atol=1e-4)


def test_group_norm_of_a_constant_image_is_its_bias():
    np.testing.assert_allclose(conv.GroupNorm(4, 2)(jnp.full((1, 3, 3, 4), 7.0)), 0.0, atol=2e-3)


def test_group_norm_keeps_statistics_in_float32():
    norm = conv.GroupNorm(4, 2, dtype="bfloat16")
    x = (normal(0, 1, 8, 8, 4) + 30).astype(jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    assert float(jnp.std(norm(x).astype(jnp.float32))) == pytest.approx(1.0, abs=0.02)


def test_group_norm_rejects_groups_that_do_not_divide():
    with pytest.raises(UserError, match="norm_groups=5"):
        conv.GroupNorm(12, 5)


def test_residual_block_adds_its_input():
    block = conv.ResBlock(8, 8, groups=2, impl="xla", dtype="float32", param_dtype="float32", key=key())
    block.conv2.kernel[...] = jnp.zeros_like(block.conv2.kernel[...])
    x = normal(0, 1, 4, 4, 8)
    np.testing.assert_array_equal(apply(block, x), x)
    assert block.nin_shortcut is None
    wider = conv.ResBlock(8, 12, groups=2, impl="xla", dtype="float32", param_dtype="float32", key=key())
    wider.conv2.kernel[...] = jnp.zeros_like(wider.conv2.kernel[...])
    np.testing.assert_allclose(apply(wider, x), apply(wider.nin_shortcut, x), rtol=1e-5, atol=1e-6)


def test_attention_block_follows_its_formula():
    block = conv.AttnBlock(6, groups=2, dtype="float32", param_dtype="float32", key=key())
    x = normal(0, 2, 3, 4, 6)
    h = np.asarray(block.norm(x)).reshape(2, 12, 6)
    q, k, v = (h @ np.asarray(layer.kernel[0, 0]) for layer in (block.q, block.k, block.v))
    scores = np.einsum("bqc,bkc->bqk", q, k) / np.sqrt(6)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = x + ((weights @ v) @ np.asarray(block.proj_out.kernel[0, 0])).reshape(x.shape)
    np.testing.assert_allclose(apply(block, x), expected, rtol=1e-5, atol=1e-5)


def test_downsample_pads_right_and_bottom_only():
    layer = conv.Downsample(2, impl="auto", dtype="float32", param_dtype="float32", key=key())
    x = normal(0, 1, 4, 6, 2)
    expected = direct(x, np.asarray(layer.conv.kernel[...]), stride=2, padding=(0, 1))
    np.testing.assert_allclose(apply(layer, x), expected, rtol=1e-5, atol=1e-6)


def test_upsample_repeats_pixels_before_its_convolution():
    layer = conv.Upsample(2, impl="xla", dtype="float32", param_dtype="float32", key=key())
    x = normal(0, 1, 2, 3, 2)
    np.testing.assert_allclose(
        apply(layer, x), apply(layer.conv, x.repeat(2, axis=1).repeat(2, axis=2)), rtol=1e-6, atol=1e-6
    )


def test_space_to_depth_orders_row_column_channel_and_is_undone():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    y = conv.space_to_depth(x, 2)
    assert y.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(y[0, 1, 2], x[0, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(conv.depth_to_space(y, 2), x)


def test_space_to_depth_rejects_sizes_that_do_not_divide():
    with pytest.raises(UserError, match="patches of 4"):
        conv.space_to_depth(jnp.zeros((1, 6, 8, 3)), 4)
