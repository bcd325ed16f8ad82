"""Checkpoints: `W/checkpoints/<step>/`, written by Orbax in the background.

A step holds two items: `state` (the TrainState) and `meta` (the data position and library versions). What is saved is
everything a run is, so that the same command continues it.
"""

import importlib.metadata
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from imagegpt_jax.cli import UserError
from imagegpt_jax.config import Config
from imagegpt_jax.state import Params, TrainState, join


def _folder(workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir).expanduser().resolve() / "checkpoints"


class Checkpoints:
    """The checkpoints of one workdir, for the training loop.

    Args:
      workdir: the run's folder, local or `gs://`.
      config: `every` (steps between checkpoints), `keep` (how many of the newest stay; 0 = all).
    """

    def __init__(self, workdir: epath.PathLike, config: Config):
        self._every = config.every
        self._manager = ocp.CheckpointManager(
            _folder(workdir),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep or None, create=True, enable_async_checkpointing=True
            ),
            item_names=("state", "meta"),
        )

    def due(self, step: int, last: int) -> bool:
        """Whether to save after `step` steps of a run of `last`."""
        return step == last or (self._every > 0 and step % self._every == 0)

    def save(self, step: int, state: TrainState, position: int) -> None:
        """Starts to save; returns as soon as the arrays have left the devices."""
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave({"position": position, "versions": versions})
            ),
            force=True,
        )

    def restore(self, state: TrainState) -> tuple[TrainState, int] | None:
        """The newest checkpoint, in the shardings of `state`, and its data position; None if there is none yet."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
                ),
                meta=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], restored["meta"]["position"]

    def close(self) -> None:
        """Waits for the save under way and raises its error, if it had one."""
        self._manager.wait_until_finished()
        self._manager.close()


def steps(workdir: epath.PathLike) -> list[int]:
    """The steps that a workdir has checkpoints of, ascending."""
    folder = _folder(workdir)
    if not folder.exists():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def choose_step(workdir: epath.PathLike, step: int | None = None) -> int:
    """The newest step, or `step` if there is a checkpoint of it.

    Raises:
      UserError: if there is no such checkpoint.
    """
    have = steps(workdir)
    if not have:
        raise UserError(f"{workdir} holds no checkpoint yet: let its training run write one first.")
    if step is None:
        return have[-1]
    if step not in have:
        raise UserError(f"{workdir} holds no checkpoint of step {step}: it has {', '.join(map(str, have))}.")
    return step


def load_params(
    workdir: epath.PathLike, abstract: TrainState, network: str, step: int | None = None, sharding: Any = None
) -> Params:
    """Reads the parameters to evaluate and sample with (the moving average where one is kept), and nothing else.

    Args:
      workdir: the run's folder.
      abstract: the run's abstract TrainState, as `jax.eval_shape` gives it.
      network: "generator", "decoder", ...
      step: None = the newest.
      sharding: tree of shardings like the network's parameters; None = the first device.

    Raises:
      UserError: if there is no such checkpoint.
    """
    step = choose_step(workdir, step)
    field = "ema" if network in abstract.ema else "trainable"
    wanted = {field: {network: getattr(abstract, field)[network]}, "frozen": {network: abstract.frozen[network]}}
    if sharding is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        sharding = jax.tree.map(lambda _: device, join(wanted[field][network], wanted["frozen"][network]))
    wanted = {part: {network: _with_sharding(tree[network], sharding)} for part, tree in wanted.items()}
    with ocp.PyTreeCheckpointer() as reader:
        restored = reader.restore(
            _folder(workdir) / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
            ),
        )
    return join(restored[field][network], restored["frozen"][network])


def _with_sharding(tree: Params, shardings: Params) -> Params:
    """Abstract arrays of a part of a network, with the shardings of their paths."""
    return {
        key: _with_sharding(leaf, shardings[key])
        if isinstance(leaf, dict)
        else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[key])
        for key, leaf in tree.items()
    }
