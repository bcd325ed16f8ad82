"""Losses against closed forms in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.losses import basic
from imagegpt_jax.models import logit_laplace


def normal(i, *shape):
    return np.asarray(jax.random.normal(jax.random.key(i), shape))


def test_l1_and_l2_are_means_in_float32():
    x, y = jnp.array([1.0, -2.0, 3.0]), jnp.array([0.0, 0.0, 1.0])
    assert float(basic.l1(x, y)) == pytest.approx(5 / 3)
    assert float(basic.l2(x, y)) == pytest.approx(3.0)
    assert basic.l2(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)).dtype == jnp.float32


def test_logit_laplace_is_the_density_of_the_paper():
    """Equation in arXiv:2102.12092, appendix A.3; and it is a density: it integrates to one over (0, 1)."""
    mean, log_scale = 0.3, -0.7
    x = np.linspace(0.1, 0.9, 9)
    b = np.exp(log_scale)
    density = np.exp(-np.abs(np.log(x / (1 - x)) - mean) / b) / (2 * b * x * (1 - x))
    images = (x - 0.1) / 0.8 * 2 - 1
    value = basic.logit_laplace(jnp.full(9, mean), jnp.full(9, log_scale), jnp.asarray(images))
    assert float(value) == pytest.approx(-np.log(density).mean(), rel=1e-5)
    fine = np.linspace(1e-6, 1 - 1e-6, 200_001)
    nll = jax.vmap(lambda x: basic.logit_laplace(jnp.float32(mean), jnp.float32(log_scale), x))
    total = np.exp(-np.asarray(nll(jnp.asarray((fine - 0.1) / 0.8 * 2 - 1)), np.float64)).mean()
    assert total == pytest.approx(1, abs=2e-3)


def test_logit_laplace_is_least_at_the_pixels_own_logits():
    images = jnp.array([-1.0, -0.2, 0.7, 1.0])
    x = 0.8 * (images + 1) / 2 + 0.1
    mean = jnp.log(x / (1 - x))
    np.testing.assert_allclose(logit_laplace.pixels(mean), images, atol=1e-6)
    best = basic.logit_laplace(mean, jnp.zeros(4), images)
    assert float(basic.logit_laplace(mean + 0.1, jnp.zeros(4), images)) == pytest.approx(float(best) + 0.1, rel=1e-4)


def test_hinge():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0, 1.0])
    assert float(basic.hinge_discriminator(real, fake)) == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)
    assert float(basic.hinge_generator(fake)) == pytest.approx(2 / 3)


def test_nonsaturating_is_cross_entropy_with_real_and_fake_labels():
    real, fake = normal(0, 9), normal(1, 9)
    p_real, p_fake = 1 / (1 + np.exp(-real)), 1 / (1 + np.exp(-fake))
    expected = -(np.log(p_real).mean() + np.log(1 - p_fake).mean()) / 2
    assert float(basic.nonsaturating_discriminator(real, fake)) == pytest.approx(expected, rel=1e-5)
    assert float(basic.nonsaturating_generator(fake)) == pytest.approx(-np.log(p_fake).mean(), rel=1e-5)


def test_lecam_pulls_logits_over_the_other_sides_average():
    real, fake = jnp.array([1.0, -1.0]), jnp.array([0.5, -2.0])
    value = basic.lecam(real, fake, average_real=jnp.array(0.0), average_fake=jnp.array(-0.5))
    assert float(value) == pytest.approx((1.5**2 + 0) / 2 + (0 + 2.0**2) / 2)


def test_r1_is_half_the_mean_squared_norm():
    gradients = normal(0, 4, 3, 3, 2)
    expected = 0.5 * np.square(gradients).reshape(4, -1).sum(1).mean()
    assert float(basic.r1(gradients)) == pytest.approx(expected, rel=1e-5)


def test_adaptive_weight_is_the_ratio_of_norms():
    rec, gan = normal(0, 3, 3, 4, 2), 0.1 * normal(1, 3, 3, 4, 2)
    expected = np.linalg.norm(rec) / (np.linalg.norm(gan) + 1e-4)
    assert float(basic.adaptive_weight(rec, gan)) == pytest.approx(expected, rel=1e-5)
    tree = basic.adaptive_weight({"a": rec[0], "b": rec[1:]}, [gan])
    assert float(tree) == pytest.approx(expected, rel=1e-5)


def test_adaptive_weight_is_bounded_and_has_no_gradient():
    assert float(basic.adaptive_weight(jnp.full(4, 10.0), jnp.zeros(4))) == 1e4
    np.testing.assert_array_equal(jax.grad(lambda x: basic.adaptive_weight(x, x * 2 + 1))(jnp.ones(3)), 0)
