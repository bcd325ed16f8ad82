"""Errors that a person can put right: suggestions for what was meant, and tables of what settings may be."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

EXIT_FAILURE = 1
EXIT_USAGE = 2


class UserError(Exception):
    """Something the person at the keyboard can put right: its message is one sentence that says how."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the known word nearest to `word`, else the list of what is known."""
    names = sorted(str(k) for k in known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(names)}." if names else ""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may be, from `at_least` or `above`.

    Attributes:
      low: the least.
      high: the largest.
      without_low: whether `low` itself is left out.
      without_high: whether `high` itself is left out.
      whole: whether only whole numbers are meant.
      meaning: what a bound stands for, such as "0 keeps all".
    """

    low: float
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False
    whole: bool = False
    meaning: str = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return above and below and (not self.whole or int(value) == value)

    def __str__(self) -> str:
        text = "a whole number, " * self.whole + f"{'above' if self.without_low else 'at least'} {self.low}"
        if self.high < math.inf:
            text += f" and {'below' if self.without_high else 'at most'} {self.high}"
        return text + (f" ({self.meaning})" if self.meaning else "")


def at_least(
    low: float, meaning: str = "", *, at_most: float = math.inf, below: float | None = None, whole: bool = False
) -> Range:
    """Numbers from `low` on, up to `at_most` or to what is `below` a limit."""
    return Range(low, at_most if below is None else below, False, below is not None, whole, meaning)


def above(low: float, meaning: str = "", *, at_most: float = math.inf) -> Range:
    """Numbers larger than `low`, up to `at_most`."""
    return Range(low, at_most, without_low=True, meaning=meaning)


# A part of a whole.
SHARE = at_least(0, at_most=1)


def check_ranges(values: Any, ranges: Mapping[str, Range], where: str = "") -> None:
    """Checks that settings lie in their ranges.

    Args:
      values: a dataclass, or a config.
      ranges: name of a setting, with dots if it lies deeper, -> the numbers that it may be.
      where: what stands before the names in an error, such as "--config.optim.".

    Raises:
      UserError: for the first that does not.
    """
    for name, allowed in ranges.items():
        value = functools.reduce(getattr, name.split("."), values)
        if value not in allowed:
            raise UserError(f"{where}{name}={value} must be {allowed}.")
