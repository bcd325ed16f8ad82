"""Extension points: an entry of one of our tables, or a user's own object or module on the Python path.

`resolve` is the only way in which a name of a config or a flag becomes code: losses, metrics, quantizers, schedules,
data sources, scorers. A user's object is written "module:name"; nothing is registered or inherited.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from imagegpt_jax.errors import UserError, suggest

T = TypeVar("T")


def resolve(name: str, what: str, table: Mapping[str, T]) -> T:
    """Returns what a name stands for.

    Args:
      name: an entry of `table`, or "module:name" of a user's own.
      what: what is named, for the error, such as "loss".
      table: our own entries.

    Raises:
      UserError: if there is none of that name, with the nearest entry, or if it cannot be imported.
    """
    return table[name] if name in table else plug_in(name, what, table)


def plug_in(name: str, what: str, known: Iterable[str] = ()) -> Any:
    """Returns the user's object that "module:name" names; `what` it is and `known` names to suggest are for errors.

    Raises:
      UserError: if it does not exist.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UserError(f"unknown {what} {name!r}.{suggest(name, known)} Your own is given as module:name.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise UserError(f"{what}={name} cannot be imported ({e}): give module:name on the Python path.") from e


def find_module(name: str, what: str, known: Iterable[str] = ()) -> str:
    """The dotted name of a user's module, which is there, and not imported yet.

    Raises:
      UserError: if it is not, with the nearest of the names that the caller knows.
    """
    if "." not in name:
        raise UserError(f"unknown {what} {name!r}.{suggest(name, known)} Your own is given as my_package.my_module.")
    if (folder := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(
            f"{what}={name} is no module on the Python path or in the current folder: set PYTHONPATH to the folder that"
            f" holds {name.partition('.')[0]}.{suggest(name, known)}"
        )
    return name
