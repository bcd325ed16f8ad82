"""Checkpoints: `W/checkpoints/<step>/`, written by Orbax in the background, and a manifest that makes them count.

A step is everything a run is (the TrainState) with a `manifest.json` beside it, written last: the hash of every file,
the position in the data, the config and the versions. A step whose manifest does not verify does not exist.
"""

from imagegpt_jax.checkpoint.manifest import Damaged, Manifest
from imagegpt_jax.checkpoint.reading import choose_step, load_params, steps
from imagegpt_jax.checkpoint.saving import Checkpoints

__all__ = ["Checkpoints", "Damaged", "Manifest", "choose_step", "load_params", "steps"]
