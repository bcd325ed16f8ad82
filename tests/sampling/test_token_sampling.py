"""Filters and draws against plain NumPy definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.sampling import token_sampling
from imagegpt_jax.sampling.settings import Sampling
from imagegpt_jax.sampling.token_sampling import Filters, sample_tokens

DRAWS = 100_000


def probabilities(logits_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What `Sampling` says, one token at a time in float64."""
    probs_V = np.exp(np.asarray(logits_V, np.float64) / temperature)
    probs_V /= probs_V.sum()
    order = sorted(range(len(probs_V)), key=lambda v: (-logits_V[v], v))
    kept = order[:top_k] if top_k else order
    whole = sum(probs_V[v] for v in kept)
    nucleus, before = [], 0.0
    for v in kept:
        if top_p == 1 or before < top_p * whole:
            nucleus.append(v)
        before += probs_V[v]
    last = [v for v in nucleus if probs_V[v] >= min_p * probs_V[order[0]]]
    out_V = np.zeros_like(probs_V)
    out_V[last] = probs_V[last]
    return out_V / out_V.sum()


weights = jax.jit(token_sampling.filtered_probabilities)
pick = jax.jit(token_sampling.sample_index)
SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 49},
    {"top_k": 500},
    {"top_p": 0.35},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.83, "min_p": 0.07},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_are_their_definition(settings):
    rng = np.random.default_rng(1)
    logits_BV = rng.normal(size=(6, 50)).astype(np.float32) * 2
    logits_BV[1] = np.round(logits_BV[1])  # many ties
    logits_BV[2] = 0.0  # nothing but ties
    logits_BV[3, 10:20] = -np.inf
    got_BV = np.asarray(weights(logits_BV, Filters.of(Sampling(**settings))), np.float64)
    got_BV /= got_BV.sum(-1, keepdims=True)
    for logits_V, got_V in zip(logits_BV, got_BV, strict=True):
        expected_V = probabilities(logits_V, **settings)
        np.testing.assert_array_equal(got_V > 0, expected_V > 0)
        np.testing.assert_allclose(got_V, expected_V, rtol=2e-5)


def test_a_full_vocabulary():
    """16384 logits, as an image decoder has: thresholds are found among numbers that are close together."""
    logits_BV = np.random.default_rng(2).normal(size=(4, 16384)).astype(np.float32)
    got_BV = np.asarray(weights(logits_BV, Filters.of(Sampling(top_k=2000))))
    expected_BV = np.sort(logits_BV, axis=1)[:, [-2000]] <= logits_BV
    np.testing.assert_array_equal(got_BV > 0, expected_BV)
    got_BV = np.asarray(weights(logits_BV, Filters.of(Sampling(top_p=0.9))))
    for logits_V, got_V in zip(logits_BV, got_BV, strict=True):
        expected = (probabilities(logits_V, top_p=0.9) > 0).sum()
        assert abs((got_V > 0).sum() - expected) <= 1  # sums in float32


def chi_square(drawn, probs_V):
    keep = probs_V > 0
    counts_V = np.bincount(drawn, minlength=len(probs_V))
    assert counts_V[~keep].sum() == 0
    expected_V = len(drawn) * probs_V[keep]
    assert expected_V.min() > 5, "chi-square needs a few draws of everything"
    return (np.square(counts_V[keep] - expected_V) / expected_V).sum(), keep.sum() - 1


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_k": 40}, {"top_p": 0.9}, {"min_p": 0.12}], ids=str)
def test_a_hundred_thousand_draws(settings):
    logits_V = np.random.default_rng(3).normal(size=50).astype(np.float32)
    probs_V = probabilities(logits_V, **settings)
    logits_BV = jnp.broadcast_to(logits_V, (DRAWS, 50))
    drawn = jax.jit(sample_tokens)(
        logits_BV, jax.random.split(jax.random.key(5), DRAWS), Filters.of(Sampling(**settings))
    )
    statistic, freedom = chi_square(np.asarray(drawn), probs_V)
    # Normal approximation of the upper 0.0005 quantile (Wilson and Hilferty 1931).
    limit = freedom * (1 - 2 / (9 * freedom) + 3.29 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit
    wrong_V = probabilities(logits_V, **(settings | {"temperature": settings.get("temperature", 1.0) * 1.05}))
    if (wrong_V > 0).tolist() == (probs_V > 0).tolist():
        assert chi_square(np.asarray(drawn), wrong_V)[0] > limit, "the test would see a temperature 5% too high"


def test_pick_never_takes_what_weighs_nothing():
    weights_V = np.zeros(400, np.float32)
    weights_V[[3, 130, 131, 399]] = [1e-3, 0.5, 1e-7, 0.25]
    edges = np.array([0.0, 1e-3 / 0.751, 0.501 / 0.751, 1 - 2**-24, 0.5, 0.9], np.float32)
    drawn = np.asarray(pick(jnp.broadcast_to(weights_V, (len(edges), 400)), edges))
    assert set(drawn.tolist()) <= {3, 130, 131, 399}
    assert (drawn[0], drawn[3]) == (3, 399)


def test_temperature_zero_takes_the_first_of_the_largest():
    logits_BV = jnp.array([[0.0, 1e-4, 0.0, 1e-4]] * 50)
    for settings in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}):
        filters = Filters.of(Sampling(temperature=0.0, **settings))
        drawn = sample_tokens(logits_BV, jax.random.split(jax.random.key(0), 50), filters)
        assert set(drawn.tolist()) == {1}


def test_settings_may_differ_by_row():
    filters = Filters(jnp.ones(400), jnp.array([1, 2, 0, 0] * 100), jnp.array([1, 1, 0.3, 1] * 100), jnp.zeros(400))
    logits_BV = jnp.log(jnp.broadcast_to(jnp.array([0.1, 0.2, 0.3, 0.4]), (400, 4)))
    drawn = sample_tokens(logits_BV, jax.random.split(jax.random.key(0), 400), filters)
    assert [set(drawn[i::4].tolist()) for i in range(4)] == [{3}, {2, 3}, {3}, {0, 1, 2, 3}]


@pytest.mark.parametrize("run", [1, 2, 3])
def test_repeats_are_the_tokens_that_would_complete_a_run_again(run):
    rng = np.random.default_rng(run)
    drawn_BN = rng.integers(0, 3, (20, 12))
    for count in (0, 1, 2, 5, 12):
        got_BV = np.asarray(token_sampling.completes_ngram(jnp.asarray(drawn_BN), jnp.int32(count), run, 3))
        for drawn_N, got_V in zip(drawn_BN.tolist(), got_BV, strict=True):
            history = drawn_N[:count]
            runs = {tuple(history[i : i + run]) for i in range(count - run + 1)}
            tail = history[count - run + 1 :] if run > 1 else []
            expected_V = [len(tail) == run - 1 and (*tail, v) in runs for v in range(3)]
            assert got_V.tolist() == expected_V
