"""What a training's config can have wrong that would else show only after its workdir is written.

Then the right command would be refused there, as that of another config. Checks read shapes, not arrays: the longest
takes about a second.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath
from jax.sharding import Mesh

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax.config import Config
from imagegpt_jax.data import quarantine
from imagegpt_jax.errors import SHARE, UserError, at_least, check_ranges, suggest
from imagegpt_jax.training import warm_start
from imagegpt_jax.training.steps import check_options

if TYPE_CHECKING:
    from imagegpt_jax.tasks.interface import Task

# What the loop reads.
RANGES = {
    "steps": at_least(1),
    "log_every": at_least(1),
    "guard.spike": at_least(0, "0 leaves no step out for a leap of its loss"),
    "guard.window": at_least(1),
    "guard.patience": at_least(0, "0 never goes back"),
    "guard.max_rollbacks": at_least(0, "0 never goes back"),
    "eval_every": at_least(0, "0 evaluates at the end alone"),
    "checkpoint.every": at_least(0, "0 saves at the end alone"),
    "checkpoint.keep": at_least(0, "0 keeps all"),
    "checkpoint.keep_every_hours": at_least(0, "0 keeps none for that"),
    "data.quarantine.max_share": SHARE,
}


def check_loop(config: Config) -> None:
    """Checks what the loop reads: numbers, which bad records are let through, the score that checkpoints are kept by.

    Raises:
      UserError: for the first that cannot work.
    """
    check_ranges(config, RANGES, "--config.")
    policy = config.data.quarantine
    quarantine.Quarantine(policy.max_share, tuple(policy.accept))  # which checks what it is given
    best = config.checkpoint.keep_best
    if best and not best.removeprefix("-").startswith("validation/"):
        raise UserError(
            f"checkpoint.keep_best={best!r} is no score of the validation split: give its name in metrics.jsonl, such"
            " as --config.checkpoint.keep_best=validation/psnr to keep the highest, or with a minus before it for the"
            " lowest."
        )


def check_start(task: "Task", setup: Any, workdir: epath.PathLike, mesh: Mesh) -> None:
    """Checks the compiler's options, and what a new run begins with.

    Raises:
      UserError: for options that the compiler refuses, a pattern of `config.frozen` that matches nothing, or parameters
        of another run, or published ones, that are not there or do not fit.
    """
    config = setup.config
    check_options(config.compiler_options, mesh.devices.flat[0].platform)
    if checkpoint.steps(workdir):  # a run that goes on no longer needs what it began with
        return
    trained = {name: setup.networks[name] for name in setup.optimizers}
    check_patterns({name: network.axes for name, network in trained.items()}, config.frozen)
    task.check_frozen(setup)
    if config.init_from:
        warm_start.check(trained, config, task.weights(setup))


def check_patterns(networks: Mapping[str, train_state.Params], patterns: Sequence[str]) -> None:
    """Checks that each pattern of `config.frozen` matches a parameter.

    Args:
      networks: those that are trained, by their names: trees like their parameters.
      patterns: the patterns.

    Raises:
      UserError: for the first that matches none; it names what is near.
    """
    paths = [path for params in networks.values() for path in train_state.flatten(params)]
    for pattern in patterns:
        if any(re.search(pattern, path) for path in paths):
            continue
        word = pattern.strip("^$/")
        depth = word.count("/") + 1
        begin = {"/".join(path.split("/")[:depth]) for path in paths}
        near = difflib.get_close_matches(word, begin, n=1)
        raise UserError(
            f"config.frozen has {pattern!r}, which matches no parameter of {' and '.join(sorted(networks))}."
            f"{suggest(word, near or {path.split('/')[0] for path in paths})}"
        )


def trained_axes(network: str, axes: train_state.Params, frozen: Sequence[str]) -> train_state.Params:
    """Logical axes of the parameters of a network that are trained, as its optimizer wants them.

    Raises:
      UserError: if all of them match a pattern of `config.frozen`.
    """
    trained, _ = train_state.partition(axes, frozen)
    if not trained:
        raise UserError(
            f"config.frozen={tuple(frozen)} leaves nothing of the {network} to train: give patterns that match a part"
            f" of its parameters, such as --config.frozen=\"('^{next(iter(axes))}/',)\"."
        )
    return trained
