"""Errors that a person can put right, and suggestions for what was meant."""

import difflib
from collections.abc import Iterable

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
