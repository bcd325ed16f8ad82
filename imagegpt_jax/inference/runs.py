"""A finished run as its workdir holds it, of any task."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax import config as config_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.tasks import interface


@dataclasses.dataclass(frozen=True)
class Run:
    """A run at a checkpoint.

    Attributes:
      task: what was trained.
      setup: its static part, without data.
      network: the network that its kind is about.
      params: of that network, averaged ones where the run keeps averages.
      step: of the checkpoint.
    """

    task: interface.Task[Any]
    setup: Any
    network: str
    params: train_state.Params
    step: int

    def module(self) -> Any:
        """The network with its parameters."""
        return self.setup.networks[self.network].module(self.params)


def read(
    path: epath.PathLike, kind: str = "", step: int | None = None, changes: Mapping[str, Any] | None = None
) -> Run:
    """Reads the run of a workdir, which must be of a `kind`, at a checkpoint, the newest by default.

    `changes` are keys of its config -> values that are used in place of its own. Raises UserError if the folder is no
    workdir, one of another kind, or without such a checkpoint.
    """
    config: Any = config_lib.load(path)
    task = interface.find(config.task)
    if kind and task.kind != kind:
        raise UserError(f"{path} holds a {task.kind}, not a {kind}: give the --workdir of a {kind}'s training run.")
    config.update(changes or {})
    setup = task.setup_for_inference(config, path)
    network, _ = task.weights(setup)
    step = checkpoint.choose_step(path, step)
    abstract = train_state.abstract(task.init_state, setup)
    return Run(task, setup, network, checkpoint.load_params(path, abstract, network, step), step)
