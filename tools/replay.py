"""Runs a training step again, from the checkpoint before it, and tells what it did to loss, gradient and parameters.

  python tools/replay.py --workdir=runs/decoder --step=1234

The step is numbered as in `bad_batches/step-1234.process-0.npz` and in the events `skip`: it is the one after 1234
others. Steps between the checkpoint and it are run as they were. Nothing is written.
"""

import sys
from typing import Any

from absl import flags

from imagegpt_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run.", required=True)
STEP = flags.DEFINE_integer("step", None, "Number of the step, from 0.", lower_bound=0, required=True)


def describe(name: str, x: Any) -> str:
    """One line about an array of a batch."""
    import numpy as np

    x = np.asarray(x)
    if x.dtype.kind not in "fiub" or not x.size:
        return f"  {name}: {x.dtype} {x.shape}, first {x.reshape(-1)[:4].tolist()}"
    wrong = int((~np.isfinite(x)).sum()) if x.dtype.kind == "f" else 0
    finite = x[np.isfinite(x)] if wrong else x
    extent = f"from {finite.min()} to {finite.max()}" if finite.size else "nothing finite"
    return f"  {name}: {x.dtype} {x.shape}, {extent}{f', {wrong} NOT FINITE' if wrong else ''}"


def main() -> None:
    """Replays the step that the flags name."""
    import dataclasses
    import functools

    import jax
    import numpy as np

    from imagegpt_jax import checkpoint, train_state
    from imagegpt_jax import config as config_lib
    from imagegpt_jax.data.pipeline import position_after
    from imagegpt_jax.parallel import sharding
    from imagegpt_jax.tasks import interface
    from imagegpt_jax.training import train_metrics
    from imagegpt_jax.training.steps import Steps, host_batch

    config = config_lib.load(WORKDIR.value)
    task = interface.find(config.task)
    setup = task.resume(config, WORKDIR.value)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        make = functools.partial(task.init_state, setup)
        state, layout = train_state.init_sharded(make, setup.networks, mesh, config.seed)
        restored = checkpoint.Checkpoints(WORKDIR.value, config).restore(state, last=STEP.value)
        position, skipped = 0, ()
        if restored is not None:
            state, position, skipped = restored[0], restored[1].position, restored[1].skipped
        else:
            state = task.load_frozen(setup, state, layout)
        begin = int(state.step)
        print(f"from the checkpoint of step {begin}, {STEP.value - begin} steps before", file=sys.stderr)
        batches = task.batches(
            setup,
            "train",
            batch_size=config.batch_size,
            position=position,
            rows=sharding.host_rows(mesh, config.batch_size),
            skipped=skipped,
        )
        stream, steps = iter(batches), Steps(task, setup, mesh, layout)

        def drawn(step: int) -> Any:
            where = position_after(position, step - begin, config.batch_size, skipped)
            return host_batch(task, setup, state, where, stream)

        for step in range(begin, STEP.value):
            batch = sharding.put_batch(drawn(step), mesh)
            phase = task.phase(setup, step)
            state, _ = steps(phase, state, steps.zeros(phase, state, batch), batch)
        held = drawn(STEP.value)
        batches.close()
        batch, phase = sharding.put_batch(held, mesh), task.phase(setup, STEP.value)

        def unguarded(state: Any, batch: Any) -> Any:
            return task.train_step(setup, phase, state, task.prepare_batch(setup, state, batch))

        new, values = jax.jit(unguarded)(state, batch)

    positions = held["position"] if "position" in held else np.zeros(1, int)
    print(f"step {STEP.value} ({phase}), positions {positions.min()} to {positions.max()}")
    print(*(describe(name, x) for name, x in held.items()), sep="\n")
    for name, value in train_metrics.fetch(values).items():
        print(f"{name} = {value:.6g}")
    for field in dataclasses.fields(new):
        tree = getattr(new, field.name)
        if field.name in ("trainable", "opt", "stats"):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                wrong = int((~np.isfinite(np.asarray(leaf, np.float64))).sum())
                if wrong:
                    print(
                        f"NOT FINITE after the step: {field.name}{jax.tree_util.keystr(path)}, {wrong} of {leaf.size}"
                    )


if __name__ == "__main__":
    cli.run(main)
