"""Traces a few training steps for xprof and TensorBoard: what the devices, the host and the input pipeline do when.

  python tools/benchmarks/profile_step.py --config=configs/decoder.py:size=emoji --output=runs/trace
  tensorboard --logdir=runs/trace        # with `pip install xprof`; or load the .json.gz in https://ui.perfetto.dev

Nothing is trained or saved. The first step, which compiles, is left out of the trace.
"""

import functools
import pathlib
import sys
import time

from absl import flags

from imagegpt_jax import cli, errors

CONFIG = cli.define_config()
OUTPUT = flags.DEFINE_string("output", None, "Folder for the trace.", required=True)
STEPS = flags.DEFINE_integer("steps", 3, "Steps to trace.", lower_bound=1)
PHASE = flags.DEFINE_string("phase", None, "Phase of the task, such as adversarial; default: that of the first step.")


def main() -> None:
    """Traces what the flags describe."""
    from imagegpt_jax.runtime import distributed, filesystem

    if OUTPUT.value.startswith("gs://"):
        raise errors.UserError(
            "--output is a folder of this machine, for JAX's profiler: copy the trace to gs:// from there."
        )
    filesystem.prepare_folder(OUTPUT.value)  # what cannot be written is told now, not after the traced steps
    distributed.initialize()
    import jax

    from imagegpt_jax import train_state
    from imagegpt_jax.parallel import sharding
    from imagegpt_jax.tasks import interface
    from imagegpt_jax.training.steps import Steps

    config = CONFIG.value
    task = interface.find(config.task)
    if config.get("tokenizer") == "":
        config.tokenizer = "untrained"  # a step takes as long with codes that are noise
    setup = task.setup(config)
    phase = PHASE.value or task.phase(setup, 0)
    if phase not in task.phases(setup):
        raise errors.UserError(f"unknown phase {phase!r}.{errors.suggest(phase, task.phases(setup))}")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
    task.check_mesh(setup, mesh)
    with jax.set_mesh(mesh):
        make = functools.partial(task.init_state, setup)
        state, layout = train_state.init_sharded(make, setup.networks, mesh, config.seed)
        state = task.load_frozen(setup, state, layout)
        rows = sharding.host_rows(mesh, config.batch_size)
        batches = task.batches(setup, "train", batch_size=config.batch_size, rows=rows)
        stream = iter(batches)
        steps = Steps(task, setup, mesh, layout)
        batch = sharding.put_batch(next(stream), mesh)
        state, totals = steps(phase, state, steps.zeros(phase, state, batch), batch)
        jax.block_until_ready(totals)
        started = time.perf_counter()
        with jax.profiler.trace(OUTPUT.value, create_perfetto_trace=jax.process_index() == 0):
            for i in range(STEPS.value):
                with jax.profiler.StepTraceAnnotation("train", step_num=i):
                    with jax.profiler.TraceAnnotation("data"):
                        batch = sharding.put_batch(next(stream), mesh)
                    state, totals = steps(phase, state, totals, batch)
            jax.block_until_ready(totals)
        seconds = (time.perf_counter() - started) / STEPS.value
        batches.close()
    if jax.process_index() == 0:
        print(f"{STEPS.value} steps of {config.task} ({phase}), {seconds:.3f} s each, traced: {OUTPUT.value}")
        traces = sorted(pathlib.Path(OUTPUT.value).rglob("*.gz"))
        print(*(f"  {path}" for path in traces), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
