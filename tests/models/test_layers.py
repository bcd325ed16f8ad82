"""Layers: norms against their formulas, rotary positions against the definition, dropout's rate and silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.models import layers


def key(i: int = 0) -> jax.Array:
    return jax.random.key(i)


def test_linear_is_x_w_plus_b():
    linear = layers.Linear(3, 5, key=key(), axes=("embed", "mlp"), bias=True)
    linear.bias[...] = jnp.arange(5.0)
    x_BLD = jax.random.normal(key(1), (2, 4, 3))
    np.testing.assert_allclose(linear(x_BLD), x_BLD @ linear.weight[...] + jnp.arange(5.0), rtol=1e-6)
    assert linear.weight.axes == ("embed", "mlp")
    assert linear.bias.axes == ("mlp",)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_has_the_gradient_of_the_product(dtype):
    linear = layers.Linear(24, 40, key=key(), axes=("embed", "mlp"), dtype=dtype)
    x_BLD, dy_BLF = jax.random.normal(key(1), (2, 8, 24)), jax.random.normal(key(2), (2, 8, 40))

    def plain(x_BLD, weight_DF):
        return jnp.einsum("bld,df->blf", x_BLD.astype(dtype), weight_DF.astype(dtype))

    def gradients(function, weight):
        return jax.grad(lambda *a: jnp.sum(function(*a) * dy_BLF.astype(dtype)), argnums=(0, 1))(x_BLD, weight)

    dx_BLD, d_linear = gradients(lambda x_BLD, linear: linear(x_BLD), linear)
    ours = dx_BLD, d_linear.weight[...]
    for results, expected in zip(ours, gradients(plain, linear.weight[...]), strict=True):
        assert results.dtype == expected.dtype
        close = (1e-6 if dtype == "float32" else 0.02) * float(jnp.abs(expected).max())
        np.testing.assert_allclose(results, expected, atol=close)


def test_on_cpu_no_gradient_contracts_two_first_dimensions():
    weight_DF, x_MD = jnp.ones((96, 192)), jnp.ones((128, 96))

    def compiled(product):
        gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.square(product(x, w)))))
        return gradient.lower(weight_DF, x_MD).compile().as_text()

    along_two = "lhs_contracting_dims={0}, rhs_contracting_dims={0}"
    assert along_two in compiled(jnp.matmul)  # what XLA makes of autodiff's
    assert along_two not in compiled(layers._product_on_cpu)


def test_linear_computes_in_dtype_and_keeps_param_dtype():
    linear = layers.Linear(3, 5, key=key(), axes=("embed", "mlp"), dtype="bfloat16", param_dtype="float32")
    assert linear.weight.dtype == jnp.float32
    assert linear(jnp.ones((1, 3))).dtype == jnp.bfloat16


def test_linear_default_init_keeps_the_variance():
    x = jax.random.normal(key(1), (64, 512))
    y = layers.Linear(512, 512, key=key(), axes=("embed", "mlp"))(x)
    assert float(y.std()) == pytest.approx(1.0, rel=0.05)


def test_unknown_dtype_gets_a_suggestion():
    with pytest.raises(UserError, match="bfloat16"):
        layers.as_dtype("bfloat61")


def test_embedding_looks_up_rows_and_scores_against_them():
    table = layers.Embedding(7, 4, key=key())
    np.testing.assert_array_equal(table(jnp.array([[3, 0]])), table.weight[...][jnp.array([[3, 0]])])
    x = jax.random.normal(key(1), (2, 4))
    whole = layers.score(x, table.rows())
    np.testing.assert_allclose(whole, x @ table.weight[...].T, rtol=1e-5)
    np.testing.assert_allclose(layers.score(x, table.rows(2, 3)), whole[:, 2:5], rtol=1e-6)


def test_rms_norm_formula():
    norm = layers.RMSNorm(6, eps=1e-5)
    norm.scale[...] = jnp.arange(1.0, 7.0)
    x = 3 + jax.random.normal(key(), (2, 6))
    expected = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * jnp.arange(1.0, 7.0)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)


def test_layer_norm_formula():
    norm = layers.LayerNorm(6, eps=1e-5, bias=True)
    norm.bias[...] = jnp.arange(6.0)
    x = 3 + jax.random.normal(key(), (2, 6))
    expected = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) + jnp.arange(6.0)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)


def test_norm_statistics_are_fp32():
    """The sum of 4096 squares of bf16 numbers is far off if it is taken in bf16."""
    x = (100 + jax.random.normal(key(), (1, 4096))).astype(jnp.bfloat16)
    y = layers.LayerNorm(4096, eps=1e-5, bias=False)(x)
    assert y.dtype == jnp.bfloat16
    assert float(jnp.std(y.astype(jnp.float32))) == pytest.approx(1.0, abs=0.01)


def test_make_norm_rejects_unknown_kinds():
    with pytest.raises(UserError, match="unknown norm"):
        layers.make_norm("rmz", 4, eps=1e-5, bias=False, param_dtype="float32")


def test_dropout_rate_scale_and_silence():
    x = jnp.ones((400, 500))
    y = layers.dropout(x, 0.3, key())
    assert float((y == 0).mean()) == pytest.approx(0.3, abs=0.01)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.01)
    np.testing.assert_array_equal(layers.dropout(x, 0.3, None), x)
    np.testing.assert_array_equal(layers.dropout(x, 0.0, key()), x)


def test_rotary_is_the_complex_rotation_of_each_axis():
    dims, head_dim, theta = (4, 2, 2), 8, 100.0
    positions = jnp.array([[[5, 2, 7]]])
    x = jax.random.normal(key(), (1, 1, 1, head_dim))
    y = layers.rotate(x, layers.rotary_table(positions, dims, head_dim, theta))[0, 0, 0]
    angles = np.array([5.0, 5 * 100 ** (-2 / 4), 2.0, 7.0])
    pairs = np.asarray(x[0, 0, 0, :4] + 1j * x[0, 0, 0, 4:]) * np.exp(1j * angles)
    np.testing.assert_allclose(np.concatenate([pairs.real, pairs.imag]), y, rtol=1e-5)


def test_rotary_scores_depend_on_differences_only():
    q, k = jax.random.normal(key(), (2, 1, 1, 1, 16))

    def dot(a, b):
        table = [layers.rotary_table(jnp.array([[p]]), (8, 4, 4), 16, 1e4) for p in (a, b)]
        return float(jnp.sum(layers.rotate(q, table[0]) * layers.rotate(k, table[1])))

    assert dot((9, 5, 3), (7, 1, 2)) == pytest.approx(dot((29, 15, 13), (27, 11, 12)), abs=1e-4)
    assert abs(dot((9, 5, 3), (7, 1, 2)) - dot((9, 5, 3), (7, 1, 3))) > 1e-3


def test_rotary_leaves_the_rest_alone():
    x = jax.random.normal(key(), (1, 1, 1, 8))
    y = layers.rotate(x, layers.rotary_table(jnp.array([[[3, 3, 3]]]), (2, 0, 0), 8, 1e4))
    np.testing.assert_array_equal(y[..., jnp.array([1, 2, 3, 5, 6, 7])], x[..., jnp.array([1, 2, 3, 5, 6, 7])])
    assert not np.allclose(y[..., 0], x[..., 0])
