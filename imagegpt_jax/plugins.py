"""Functions that a person names as "module:function"."""

import importlib
from collections.abc import Iterable
from typing import Any

from imagegpt_jax.errors import UserError, suggest


def plug_in(name: str, what: str, known: Iterable[str] = ()) -> Any:
    """The function that "module:function" names.

    Raises:
      UserError: if it does not exist, saying what is known.
    """
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"unknown {what} {name!r}.{suggest(name, known)} Others are given as module:function.")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise UserError(f"{what}={name} cannot be imported ({e}): give module:function on the Python path.") from e
