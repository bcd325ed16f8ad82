import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 900


@pytest.mark.parametrize(
    ("peak", "largest", "most"),
    [
        (lambda b: 100 + 8 * b, 100, 6),  # a straight line
        (lambda b: max(300, 100 + 2 * b), 400, 10),  # small batches peak elsewhere
        (lambda b: max(300, 100 + 2 * b) if b < 300 else None, 299, 20),  # the compiler gives up below the limit
        (lambda b: 100 + b * b // 50, 200, 16),  # a curve
        (lambda b: 890 + 10 * b, 1, 3),
        (lambda b: LIMIT + b, 0, 1),
        (lambda b: None, 0, 1),
    ],
)
def test_the_largest_batch_is_found_in_few_looks_and_the_next_was_looked_at(monkeypatch, peak, largest, most):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import plan_search

    looked = {}

    @functools.cache
    def recorded(batch):
        looked[batch] = peak(batch)
        return looked[batch]

    assert plan_search.largest(recorded, LIMIT) == largest
    assert largest + 1 in looked
    assert len(looked) <= most
