"""Streaming statistics: however they are cut and merged they are the same, and they keep no features."""

import tracemalloc

import numpy as np
import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import statistics


def rows(count, size=24, seed=0):
    return np.random.default_rng(seed).normal(3, 2, (count, size)).astype(np.float32)


def moments_of(*parts):
    moments = statistics.Moments(parts[0].shape[1])
    for part in parts:
        moments.add(part)
    return moments


@pytest.mark.parametrize("count", [2, 7, 256, 700])
def test_moments_are_mean_and_covariance(count):
    given = rows(count)
    moments = moments_of(given)
    assert moments.count == count
    np.testing.assert_allclose(moments.mean, given.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(
        moments.covariance, np.cov(given.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("batch", [1, 7, 64, 300])
def test_batches_do_not_matter_to_the_bit(batch):
    given = rows(700)
    whole, cut = moments_of(given), moments_of(*(given[i : i + batch] for i in range(0, 700, batch)))
    np.testing.assert_array_equal(cut.mean, whole.mean)
    np.testing.assert_array_equal(cut.covariance, whole.covariance)


def test_a_large_mean_does_not_cost_the_covariance():
    given = rows(500).astype(np.float64)
    far = moments_of(given + 1e6).covariance
    np.testing.assert_allclose(far, np.cov(given, rowvar=False), rtol=1e-6, atol=1e-8)


def test_a_covariance_of_one_image_is_refused():
    with pytest.raises(UserError, match="at least 2 images"):
        _ = moments_of(rows(1)).covariance


def test_memory_does_not_grow_with_features():
    """From 1,000 to 4,000 features of Inception's size: what the sums need is there from the first block on."""
    moments, scores = statistics.Moments(2048), statistics.ClassScores(10, 1008)
    kept = statistics.Rows(2048)
    rng = np.random.default_rng(0)
    peaks = {}
    tracemalloc.start()
    for count in range(100, 4001, 100):
        features = rng.random((100, 2048), np.float32)
        moments.add(features)
        kept.add(features)
        scores.add(features[:, :1008], np.arange(100) % 10)
        if count in (1000, 4000):
            peaks[count] = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (moments.count, len(kept)) == (4000, 4000)
    for held in (0, 1):  # now, and at most so far
        assert peaks[4000][held] - peaks[1000][held] < 5e6


def test_rows_come_back_from_the_file():
    given = rows(30)
    kept = statistics.Rows(24)
    for start in range(0, 30, 7):
        kept.add(given[start : start + 7])
    np.testing.assert_array_equal(kept.take([29, 0, 13, 13]), given[[29, 0, 13, 13]])
    np.testing.assert_array_equal(kept.block(25, 99), given[25:])
    kept.close()


def inception_score(logits, split_N):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    parts = [p[split_N == s] for s in range(split_N.max() + 1)]
    return np.array([np.exp((q * (np.log(q) - np.log(q.mean(axis=0)))).sum(axis=1).mean()) for q in parts])


def test_class_scores_are_the_definition():
    logits = np.random.default_rng(0).normal(0, 3, (90, 12))
    split_N = np.arange(90) % 4
    one, parts = statistics.ClassScores(4, 12), statistics.ClassScores(4, 12)
    one.add(logits, split_N)
    for i in range(0, 90, 9):
        parts.add(logits[i : i + 9], split_N[i : i + 9])
    np.testing.assert_allclose(one.scores, inception_score(logits, split_N), rtol=1e-12)
    np.testing.assert_allclose(parts.scores, one.scores, rtol=1e-12)
    assert parts.counts_S.tolist() == [23, 23, 22, 22]


def test_splits_in_order_and_shuffled():
    np.testing.assert_array_equal(statistics.splits_by_number(10, 3, None), [0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    shuffled = statistics.splits_by_number(10, 3, 2020)
    order = np.random.RandomState(2020).permutation(10)
    np.testing.assert_array_equal(shuffled[order], statistics.splits_by_number(10, 3, None))
