"""Reading finished checkpoints: the newest that verifies, and the parameters of one network."""

import sys
from typing import Any

import jax
from etils import epath

from imagegpt_jax.checkpoint import folders, trees
from imagegpt_jax.checkpoint import manifest as manifest_lib
from imagegpt_jax.checkpoint.manifest import Damaged
from imagegpt_jax.errors import UserError
from imagegpt_jax.train_state import Params, TrainState, join


def choose_step(workdir: epath.PathLike, step: int | None = None) -> int:
    """The newest step that verifies, or `step` if it does; every file is read.

    A newer step that is damaged is left out, with a line on stderr. Raises UserError if there is no such checkpoint,
    or it is damaged.
    """
    have = folders.finished(workdir)
    if not have:
        raise UserError(f"{workdir} holds no checkpoint yet: let its training run write one first.")
    if step is not None and step not in have:
        raise UserError(f"{workdir} holds no checkpoint of step {step}: it has {', '.join(map(str, have))}.")
    problem = None
    for candidate in reversed(have) if step is None else [step]:
        try:
            manifest_lib.check(folders.root(workdir) / str(candidate))
            return candidate
        except Damaged as e:
            problem = problem or e
            if step is None:
                print(f"warning: the checkpoint of step {candidate} is damaged ({e}).", file=sys.stderr)
    raise UserError(
        f"the checkpoint of step {have[-1] if step is None else step} is damaged ({problem}):"
        f" {'choose another --step' if step is not None and len(have) > 1 else 'bring back a copy of it'}."
    )


def load_params(
    workdir: epath.PathLike, abstract: TrainState, network: str, step: int | None = None, sharding: Any = None
) -> Params:
    """Reads the parameters to evaluate and sample with (the moving average where one is kept), and nothing else.

    Args:
      workdir: the run's folder.
      abstract: the run's abstract TrainState, as `jax.eval_shape` gives it.
      network: "generator", "decoder", ...
      step: None = the newest that verifies.
      sharding: tree of shardings like the network's parameters; None = the first device.

    Raises:
      UserError: if there is no such checkpoint, or it is damaged.
    """
    step = choose_step(workdir, step)
    field = "ema" if network in abstract.ema else "trainable"
    wanted = {field: {network: getattr(abstract, field)[network]}, "frozen": {network: abstract.frozen[network]}}
    if sharding is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        sharding = jax.tree.map(lambda _: device, join(wanted[field][network], wanted["frozen"][network]))
    wanted = {part: {network: _with_sharding(tree[network], sharding)} for part, tree in wanted.items()}
    restored = trees.read(folders.root(workdir) / str(step), wanted)
    return join(restored[field][network], restored["frozen"][network])


def _with_sharding(tree: Params, shardings: Params) -> Params:
    """Abstract arrays of a part of a network, with the shardings of their paths."""
    return {
        key: _with_sharding(leaf, shardings[key])
        if isinstance(leaf, dict)
        else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[key])
        for key, leaf in tree.items()
    }
