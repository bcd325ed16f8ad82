import types

import pytest

from imagegpt_jax.errors import SHARE, UserError, above, at_least, check_ranges


@pytest.mark.parametrize(
    ("allowed", "good", "bad", "words"),
    [
        (at_least(1), (1, 1e9, float("inf")), (0.5, float("nan")), "at least 1"),
        (at_least(0, "0 keeps all", whole=True), (0, 3, 4.0), (-1, 2.5), r"a whole number, at least 0 \(0 keeps all\)"),
        (at_least(0, below=1), (0, 0.9), (1, -0.1), "at least 0 and below 1"),
        (at_least(0, below=float("inf")), (0, 1e9), (float("inf"),), "at least 0"),
        (above(0, at_most=1), (0.1, 1), (0, 1.1, float("nan")), "above 0 and at most 1"),
        (SHARE, (0, 1), (-0.1, 1.1), "at least 0 and at most 1"),
    ],
)
def test_numbers_lie_in_their_ranges(allowed, good, bad, words):
    for value in good:
        check_ranges(types.SimpleNamespace(a=types.SimpleNamespace(b=value)), {"a.b": allowed})
    for value in bad:
        with pytest.raises(UserError, match=rf"--config\.a\.b={value} must be {words}\.$"):
            check_ranges(types.SimpleNamespace(a=types.SimpleNamespace(b=value)), {"a.b": allowed}, "--config.")
