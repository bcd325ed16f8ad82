"""What a training's config can have wrong that would else be found only after its workdir is written.

Then the right command would be refused there, as that of another config. Each check costs milliseconds.
"""

from collections.abc import Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from imagegpt_jax import checkpoint
from imagegpt_jax import state as state_lib
from imagegpt_jax.cli import UserError
from imagegpt_jax.config import Config
from imagegpt_jax.convert import reading
from imagegpt_jax.steps import check_options

# What the loop reads: key -> (the least it can be, what that means where it says more than "that often").
_LEAST = {
    "steps": (1, ""),
    "log_every": (1, ""),
    "guard.spike": (0, "leaves no step out for a leap of its loss"),
    "guard.window": (1, ""),
    "guard.patience": (0, "never goes back"),
    "guard.max_rollbacks": (0, "never goes back"),
}


def check_counts(config: Config) -> None:
    """Checks the numbers that the loop reads.

    Raises:
      UserError: for the first that is too small.
    """
    for key, (least, meaning) in _LEAST.items():
        value: Any = config
        for name in key.split("."):
            value = value[name]
        at_least(key, value, least, meaning)


def at_least(key: str, value: float, least: int, meaning: str = "") -> None:
    """Raises UserError if the value of a config key is below the least that works, of which `meaning` tells more."""
    if not value >= least:
        raise UserError(
            f"{key}={value} is not possible: set --config.{key}={least}{f' ({meaning})' if meaning else ''} or more."
        )


def check_start(config: Config, workdir: epath.PathLike, mesh: Mesh) -> None:
    """Checks the compiler's options, and what a new run begins with.

    Raises:
      UserError: for options that the compiler refuses, or a `config.init_from` that holds no parameters.
    """
    check_options(config.compiler_options, mesh.devices.flat[0].platform)
    source = config.init_from
    if not source or checkpoint.steps(workdir):  # a run that goes on no longer needs what it began with
        return
    if not reading.is_weights(source) and not checkpoint.steps(source):
        raise UserError(
            f"config.init_from={source} holds no checkpoint and no weights: give the workdir of a run that has saved"
            " one, or a folder of weights."
        )


def trained_axes(network: str, axes: state_lib.Params, frozen: Sequence[str]) -> state_lib.Params:
    """Logical axes of the parameters of a network that are trained, as its optimizer wants them.

    Raises:
      UserError: if all of them match a pattern of `config.frozen`.
    """
    trained, _ = state_lib.partition(axes, frozen)
    if not trained:
        raise UserError(
            f"config.frozen={tuple(frozen)} leaves nothing of the {network} to train: give patterns that match a part"
            f" of its parameters, such as --config.frozen=\"('^{next(iter(axes))}/',)\"."
        )
    return trained
