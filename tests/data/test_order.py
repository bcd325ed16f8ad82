import collections
import math

import numpy as np
import pytest

from imagegpt_jax.data.order import Order, hash_positions, keys, permute, quotas, schedule
from imagegpt_jax.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_permute_is_a_bijection(size):
    out = permute(np.arange(size), size, keys(0, 0, 0))
    assert sorted(out) == list(range(size))


def test_permute_does_not_depend_on_what_is_asked_for_at_once():
    whole = permute(np.arange(1000), 1000, keys(3, 1, 4))
    parts = [permute(np.array([i]), 1000, keys(3, 1, 4))[0] for i in (0, 7, 999)]
    assert parts == whole[[0, 7, 999]].tolist()


def test_permute_of_a_huge_set():
    index = np.array([0, 1, 10**12 - 1, 5 * 10**11])
    out = permute(index, 10**12, keys(0, 0, 0))
    assert len(set(out.tolist())) == 4
    assert (out >= 0).all()
    assert (out < 10**12).all()


def test_all_orders_of_five_are_equally_likely():
    counts = collections.Counter(
        tuple(permute(np.arange(5), 5, keys(seed, 0, epoch))) for seed in range(10) for epoch in range(240)
    )
    expected = 2400 / math.factorial(5)
    chi_squared = sum((n - expected) ** 2 / expected for n in counts.values())
    assert len(counts) == 120
    assert chi_squared < 180  # 119 degrees of freedom: the 99.98th percentile is 180


def test_examples_land_anywhere():
    counts = np.zeros((20, 20))
    for epoch in range(2000):
        counts[np.arange(20), permute(np.arange(20), 20, keys(0, 0, epoch))] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 480  # 361 degrees of freedom


def test_every_epoch_and_seed_and_source_has_another_order():
    orders = {
        tuple(permute(np.arange(20), 20, keys(seed, source, epoch)))
        for seed in range(3)
        for source in range(2)
        for epoch in range(50)
    }
    assert len(orders) == 300


def test_order_is_pinned():
    # A checkpoint's position means the same examples in every release: this may only change with a note in CHANGELOG.
    assert Order([10], seed=0, shuffle=True)(np.arange(12)).tolist() == [8, 4, 3, 6, 9, 0, 2, 7, 5, 1, 3, 5]
    assert hash_positions(np.arange(2), 0, 1).tolist() == [779303097562282652, 373395753953534141]


def test_each_epoch_has_every_example_once():
    order = Order([7], seed=1, shuffle=True)
    out = order(np.arange(21)).reshape(3, 7)
    assert (np.sort(out, axis=1) == np.arange(7)).all()
    assert len({tuple(row) for row in out}) > 1


def test_unshuffled_order_is_that_of_the_sources():
    order = Order([3, 2], [0.1, 0.9], seed=1, shuffle=False)
    assert order(np.arange(7)).tolist() == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [5, 3, 1, 1], [0.97, 0.02, 0.01], [1 / 3, 2 / 3]])
def test_schedule_holds_the_weights_within_one(weights):
    source = schedule(quotas(weights))
    share = np.array(weights) / sum(weights)
    length = np.arange(1, len(source) + 1)
    for i, s in enumerate(share):
        assert np.abs(np.cumsum(source == i) - length * s).max() < 1


def test_mixture_visits_every_example_of_each_source_once_per_its_epoch():
    order = Order([7, 3], [0.7, 0.3], seed=0, shuffle=True)
    out = order(np.arange(100))
    first = out[out < 7]
    assert len(first) == 70
    assert (np.sort(first.reshape(10, 7), axis=1) == np.arange(7)).all()


def test_quotas():
    assert quotas([0.7, 0.3]) == [7, 3]
    assert sum(quotas([5394, 60000, 7])) == 10_000
    assert min(quotas([5394, 60000, 7])) == 1
    with pytest.raises(UserError, match="positive"):
        quotas([1, 0])
    with pytest.raises(UserError, match="at least"):
        quotas([1e7, 1])
