"""The search of `tools/scale/plan.py`: the largest number whose peak stays within a limit, in few looks."""

import itertools
from collections.abc import Callable


def largest(peak: Callable[[int], int | None], limit: float) -> int:
    """The largest batch whose peak is within a limit; 0 if not even one example's is. The next one was looked at.

    A straight line through two peaks says where to look. Small batches may peak where the batch does not matter, so no
    guess is more than eight times a batch that fits; every third one halves what is left.

    Args:
      peak: bytes at a batch, never falling; None where it is beyond what can be said. Called again for the same batch.
      limit: bytes.
    """

    def fits(batch: int) -> bool:
        bytes_needed = peak(batch)
        return bytes_needed is not None and bytes_needed <= limit

    if not fits(1):
        return 0
    good, over = [1], 0
    for count in itertools.count():
        if over and over - good[-1] == 1:
            break
        known = [*good, over] if over and peak(over) is not None else good
        guess = _crossing(peak, limit, *known[-2:]) if len(known) > 1 else 2
        if over and (guess >= over or count % 3 == 2):
            guess = (good[-1] + over) // 2
        guess = max(good[-1] + 1, guess if over else min(guess, 8 * good[-1]))
        if fits(guess):
            good.append(guess)
        else:
            over = guess
    return good[-1]


def _crossing(peak: Callable[[int], int | None], limit: float, low: int, high: int) -> int:
    """Where the line through the peaks of two batches meets the limit."""
    one, two = peak(low), peak(high)
    assert one is not None
    assert two is not None
    return int(low + (limit - one) * (high - low) / (two - one)) if two > one else 8 * high
