"""Quantizer: nearest codes and losses against NumPy, whose gradient goes where, revival, and what usage means."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.quantizers import Quantizer, QuantizerConfig, init_stats, use
from imagegpt_jax.models.quantizers import codebook as codebooks

CONFIG = QuantizerConfig(num_codes=24, code_dim=3, revival_steps=3)


def key(i=0):
    return jax.random.key(i)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def squared_distances(z_NZ, codebook_KZ):
    return np.square(np.asarray(z_NZ)[:, None] - np.asarray(codebook_KZ)[None]).sum(-1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("chunk", [24, 8])
def test_codes_are_the_nearest(normalize, chunk):
    config = dataclasses.replace(CONFIG, l2_normalize=normalize, chunk_codes=chunk)
    quantizer = Quantizer(config, key=key())
    quantizer.embedding[...] = jax.random.normal(key(1), (24, 3))
    z = jax.random.normal(key(2), (2, 4, 5, 3))
    rows, codebook = np.asarray(z).reshape(-1, 3), np.asarray(quantizer.embedding[...])
    if normalize:
        rows, codebook = unit(rows), unit(codebook)
    expected = squared_distances(rows, codebook).argmin(-1).reshape(2, 4, 5)
    quantized = quantizer(z)
    np.testing.assert_array_equal(quantized.codes, expected)
    np.testing.assert_array_equal(quantizer.nearest(z), expected)
    np.testing.assert_array_equal(quantized.zq, quantizer.lookup(quantized.codes))  # to the last bit
    np.testing.assert_allclose(quantized.zq, codebook[expected], rtol=1e-6)
    np.testing.assert_array_equal(quantized.sums.counts_I, np.bincount(expected.ravel(), minlength=24))


def losses_and_gradients(config, term):
    graphdef, params = nnx.split(Quantizer(config, key=key()))

    def loss(z, params):
        quantized = nnx.merge(graphdef, params)(z)
        return term(quantized), quantized

    z = jax.random.normal(key(1), (7, 3))
    value, (dz, dparams) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(z, params)
    return value, (dz, dparams.embedding[...])


def test_commitment_moves_the_encoder_and_codebook_loss_the_codes():
    config = dataclasses.replace(CONFIG, l2_normalize=False)
    (commitment, quantized), (dz, dcodes) = losses_and_gradients(config, lambda q: q.losses["commitment"])
    z = np.asarray(quantized.vectors)[:, 0]
    assert float(commitment) == pytest.approx(np.square(z - quantized.zq).mean(), rel=1e-5)
    np.testing.assert_allclose(dz, 2 * (z - quantized.zq) / z.size, rtol=1e-5)
    np.testing.assert_array_equal(dcodes, 0)

    (codebook, quantized), (dz, dcodes) = losses_and_gradients(config, lambda q: q.losses["codebook"])
    assert float(codebook) == pytest.approx(float(commitment), rel=1e-6)
    np.testing.assert_array_equal(dz, 0)
    used = np.unique(quantized.codes)
    assert np.all(np.any(np.asarray(dcodes)[used] != 0, axis=-1))


def test_loss_is_the_weighted_sum():
    config = dataclasses.replace(
        CONFIG, commitment_weight=0.3, codebook_weight=2.0, entropy_weight=0.7, entropy_temperature=0.5
    )
    (loss, quantized), _ = losses_and_gradients(config, lambda q: q.loss)
    terms = quantized.losses
    expected = 0.3 * terms["commitment"] + 2.0 * terms["codebook"] + 0.7 * terms["entropy"]
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    plain = losses_and_gradients(CONFIG, lambda q: q.loss)[0][1]
    assert set(plain.losses) == {"commitment", "codebook"}


def test_gradient_goes_straight_through():
    config = dataclasses.replace(CONFIG, l2_normalize=False)
    weights = jax.random.normal(key(5), (7, 3))
    _, (dz, dcodes) = losses_and_gradients(config, lambda q: jnp.sum(q.zq * weights))
    np.testing.assert_array_equal(dz, weights)
    np.testing.assert_array_equal(dcodes, 0)


def test_straight_through_gradient_of_normalised_vectors_is_tangent():
    weights = jax.random.normal(key(5), (7, 3))
    (_, quantized), (dz, _) = losses_and_gradients(CONFIG, lambda q: jnp.sum(q.zq * weights))
    assert np.abs(dz).max() > 0.01
    np.testing.assert_allclose(np.sum(np.asarray(dz) * quantized.vectors[:, 0], axis=-1), 0, atol=1e-6)


def test_zero_vectors_have_finite_gradients():
    gradient = jax.grad(lambda z: jnp.sum(codebooks.l2_normalize(z) * 3.0))(jnp.zeros((2, 3)))
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("chunk", [24, 6])
def test_entropy_loss_is_sample_minus_batch_entropy(chunk):
    z, codebook = unit(np.asarray(jax.random.normal(key(1), (11, 3)))), np.asarray(jax.random.normal(key(2), (24, 3)))
    logits = -squared_distances(z, codebook) / 0.2
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    expected = -(p * np.log(p)).sum(-1).mean() + (mean * np.log(mean)).sum()
    value, gradient = jax.value_and_grad(codebooks.entropy_loss)(jnp.asarray(z), jnp.asarray(codebook), 0.2, chunk)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    step = 1e-3 * np.asarray(jax.random.normal(key(3), z.shape))
    ahead, behind = (
        codebooks.entropy_loss(jnp.asarray(z + s), jnp.asarray(codebook), 0.2, chunk) for s in (step, -step)
    )
    assert float(ahead - behind) / 2 == pytest.approx(float(jnp.sum(gradient * step)), rel=0.02)


def test_entropy_loss_is_least_when_sure_codes_are_evenly_used():
    codebook = jnp.eye(3)
    even, collapsed = jnp.eye(3), jnp.tile(jnp.eye(3)[:1], (3, 1))
    assert float(codebooks.entropy_loss(even, codebook, 0.01, 3)) == pytest.approx(-np.log(3), rel=1e-5)
    assert float(codebooks.entropy_loss(collapsed, codebook, 0.01, 3)) == pytest.approx(0, abs=1e-6)


def test_first_revival_sets_the_whole_codebook_from_the_batch():
    quantizer = Quantizer(CONFIG, key=key())
    z = jax.random.normal(key(1), (30, 3))
    quantized = quantizer(z)
    stats = use.update_stats(CONFIG, init_stats(CONFIG), quantized.sums.counts_I)
    codebook, stats, revived = use.revive(CONFIG, quantizer.embedding[...], stats, quantized.vectors, key(2))
    assert bool(revived.all())
    rows = {tuple(r) for r in unit(np.asarray(z)).round(4).tolist()}
    drawn = [tuple(r) for r in np.asarray(codebook).round(4).tolist()]
    assert set(drawn) <= rows
    assert len(set(drawn)) == 24  # no vector twice while there are enough
    np.testing.assert_array_equal(stats.age_I, 0)


def test_only_codes_unused_for_revival_steps_are_replaced():
    quantizer = Quantizer(CONFIG, key=key())
    quantizer.embedding[...] = jax.random.normal(key(1), (24, 3))
    z = quantizer.lookup(jnp.arange(4))  # chooses codes 0 to 3 only
    stats = init_stats(CONFIG)
    quantized = quantizer(z)
    stats = use.update_stats(CONFIG, stats, quantized.sums.counts_I)
    before = quantizer.embedding[...]
    stats = stats._replace(age_I=jnp.zeros_like(stats.age_I))  # as after the first revival
    for step in range(CONFIG.revival_steps):
        _, _, revived = use.revive(CONFIG, before, stats, quantized.vectors, key(step))
        assert not bool(revived.any())
        quantized = quantizer(z)
        stats = use.update_stats(CONFIG, stats, quantized.sums.counts_I)
    codebook, stats, revived = use.revive(CONFIG, before, stats, quantized.vectors, key(9))
    np.testing.assert_array_equal(revived, np.arange(24) >= 4)
    np.testing.assert_array_equal(codebook[:4], before[:4])
    assert np.all(np.any(codebook[4:] != before[4:], axis=-1))
    np.testing.assert_array_equal(stats.age_I, 0)


def test_revival_is_a_function_of_the_key():
    quantizer, z = Quantizer(CONFIG, key=key()), jax.random.normal(key(1), (40, 3))
    quantized = quantizer(z)
    stats = use.update_stats(CONFIG, init_stats(CONFIG), quantized.sums.counts_I)
    first, again, other = (
        use.revive(CONFIG, quantizer.embedding[...], stats, quantized.vectors, key(i))[0] for i in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_revival_can_be_off_and_draws_again_when_vectors_are_few():
    quantizer, z = Quantizer(CONFIG, key=key()), jax.random.normal(key(1), (5, 3))
    quantized = quantizer(z)
    stats = use.update_stats(CONFIG, init_stats(CONFIG), quantized.sums.counts_I)
    codebook, _, _ = use.revive(CONFIG, quantizer.embedding[...], stats, quantized.vectors, key(2))
    assert len(np.unique(np.asarray(codebook), axis=0)) == 5
    off = dataclasses.replace(CONFIG, revival_steps=0)
    codebook, _, revived = use.revive(off, quantizer.embedding[...], init_stats(off), quantized.vectors, key(2))
    np.testing.assert_array_equal(codebook, quantizer.embedding[...])
    assert not bool(revived.any())


def test_mistakes_in_the_config_are_explained():
    with pytest.raises(UserError, match="'vq'"):
        QuantizerConfig(kind="vqq")
    with pytest.raises(UserError, match="chunk_codes=7"):
        QuantizerConfig(num_codes=24, chunk_codes=7)
