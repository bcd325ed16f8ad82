"""Checkpoints: `W/checkpoints/<step>/`, written by Orbax in the background, and a manifest that makes them count.

A step is everything a run is (the TrainState) with a `manifest.json` beside it, written last: the hash of every file,
the position in the data, the config and the versions. A step whose manifest does not verify does not exist.
`python -m imagegpt_jax.checkpoint` lists, verifies, repairs and compares them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from imagegpt_jax.checkpoint.folders import finished as steps
from imagegpt_jax.checkpoint.manifest import Damaged, Manifest

if TYPE_CHECKING:
    from imagegpt_jax.checkpoint.reading import choose_step, load_params
    from imagegpt_jax.checkpoint.saving import Checkpoints

__all__ = ["Checkpoints", "Damaged", "Manifest", "choose_step", "load_params", "steps"]


def __getattr__(name: str) -> Any:
    """Listing and verifying need neither JAX nor Orbax, which take seconds to start."""
    for module in ("reading", "saving"):
        if name in __all__ and hasattr(imported := importlib.import_module(f"{__name__}.{module}"), name):
            return getattr(imported, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
