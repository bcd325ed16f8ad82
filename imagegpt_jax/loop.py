"""The only training loop, shared by all stages.

It knows a stage by the names of its task module: `setup`, `check_mesh`, `phase`, `init_state`, `train_step`,
`step_flops`, `batches`, `evaluate`, `save_assets`, `SHOWN`; where a batch must be made on the device first,
`prepare_batch`; and where frozen networks come from another run, `load_frozen`. One compiled step per phase; metrics
stay on the device and those of an interval are fetched after the next step has been dispatched.
"""

import functools
import time
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from tqdm import tqdm

from imagegpt_jax import checkpoint, distributed, hardware, metrics, sharding, storage
from imagegpt_jax import config as config_lib
from imagegpt_jax import state as state_lib
from imagegpt_jax.config import Config


def run(task: ModuleType, config: Config, workdir: epath.PathLike) -> state_lib.TrainState:
    """Trains a stage to `config.steps`, from the newest checkpoint of the workdir if there is one.

    Args:
      task: module of the stage, such as `imagegpt_jax.tasks.tokenizer`.
      config: its config.
      workdir: folder for checkpoints, logs and pictures.

    Returns:
      The last TrainState.

    Raises:
      UserError: for a config, data set or workdir that cannot work; before any step, leaving nothing behind.
    """
    # --- Everything a person can get wrong, before devices and files.
    config_lib.check_workdir(config, workdir)
    setup = task.setup(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
    sharding.check_batch_size(config.eval_batch_size, mesh, key="eval_batch_size")
    task.check_mesh(setup, mesh)
    distributed.agree(config=config_lib.to_dict(config), workdir=str(workdir), **_made_of(setup))

    with jax.set_mesh(mesh):
        # --- State: born sharded, or restored onto the same shardings.
        make = functools.partial(task.init_state, setup)
        state, layout = state_lib.init_sharded(make, setup.networks, mesh, config.seed)
        if distributed.is_first():
            with storage.writing(workdir):
                config_lib.save(config, workdir)
                task.save_assets(setup, workdir)
        distributed.meet_at(epath.Path(workdir) / "config.json")
        checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint)
        position = 0
        restored = checkpoints.restore(state)
        if restored is not None:
            state, position = restored
        elif hasattr(task, "load_frozen"):
            state = task.load_frozen(setup, state, layout)
        first = int(state.step)
        writer = metrics.Writer(workdir, first)
        try:
            with distributed.failing_together():
                state = _train(task, setup, mesh, state, layout, first, position, checkpoints, writer)
        finally:
            checkpoints.close()
            writer.close()
    return state


def _made_of(setup: Any) -> dict[str, Any]:
    """What a run is made of beside its config: the same on every process."""
    facts = {"data": [source.fingerprint for source in setup.sources.values()]}
    text = getattr(setup, "text", None)
    return facts if text is None else {**facts, "text_tokenizer": text.fingerprint}


def _train(
    task: ModuleType,
    setup: Any,
    mesh: jax.sharding.Mesh,
    state: state_lib.TrainState,
    layout: state_lib.TrainState,
    first: int,
    position: int,
    checkpoints: checkpoint.Checkpoints,
    writer: metrics.Writer,
) -> state_lib.TrainState:
    config = setup.config
    last = config.steps
    rows = sharding.host_rows(mesh, config.batch_size)
    batches = task.batches(setup, "train", batch_size=config.batch_size, position=position, rows=rows)
    stream = iter(batches)
    steps = Steps(task, setup, mesh, layout)
    chip = hardware.chip_of(jax.devices()[0].device_kind)
    clock = metrics.Throughput(mesh.size, None if chip is None else chip.flops)
    totals: metrics.Totals | None = None
    pending: tuple[int, metrics.Totals] | None = None
    chatty = jax.process_index() == 0
    bar = tqdm(total=last, initial=first, desc=config.task, unit="step", disable=not chatty, mininterval=1.0)

    def write(step: int, finished: metrics.Totals) -> None:
        values = {f"train/{k}": v for k, v in metrics.fetch(finished).items()}
        writer.scalars(step, values)
        writer.scalars(step, clock.read(), file="timing")
        bar.set_postfix({k: f"{values[f'train/{k}']:.4g}" for k in task.SHOWN if f"train/{k}" in values}, refresh=False)

    for step in range(first + 1, last + 1):
        # --- Dispatch one step.
        started = time.perf_counter()
        batch = sharding.put_batch(next(stream), mesh)
        clock.add("data_wait", time.perf_counter() - started)
        phase = task.phase(setup, step - 1)
        if totals is None:
            totals = steps.zeros(phase, state, batch)
        state, totals = steps(phase, state, totals, batch)
        tokens = batch["tokens"].size if "tokens" in batch else 0
        clock.count(config.batch_size, tokens, steps.flops(phase, batch) if chip is not None else 0.0)
        bar.update()

        # --- Metrics of the interval before, while this step runs.
        if pending is not None:
            write(*pending)
            pending = None
        if step % config.log_every == 0 or step == last or task.phase(setup, step) != phase:
            pending, totals = (step, totals), None

        # --- Evaluations and checkpoints.
        if step == last or (config.eval_every and step % config.eval_every == 0):
            if pending is not None:  # an evaluation waits for the steps before it: their time is theirs
                write(*pending)
                pending = None
            started = time.perf_counter()
            scalars, images = task.evaluate(setup, state, mesh)
            writer.scalars(step, scalars)
            writer.images(step, images)
            clock.add("evaluation", time.perf_counter() - started)
        started = time.perf_counter()
        if checkpoints.due(step, last):
            checkpoints.save(step, state, batches.position)
            clock.add("checkpoint", time.perf_counter() - started)
    if pending is not None:
        write(*pending)
    bar.close()
    batches.close()
    return state


class Steps:
    """The compiled steps of a task, one per phase.

    Args:
      task: module of the stage.
      setup: its static part.
      mesh: the devices.
      layout: shardings of the state.
    """

    def __init__(self, task: ModuleType, setup: Any, mesh: jax.sharding.Mesh, layout: state_lib.TrainState):
        self._task, self._setup = task, setup
        self._layout, self._whole = layout, sharding.replicated(mesh)
        self._shapes: dict[str, Any] = {}
        self._flops: dict[str, float] = {}
        self.compiled: dict[str, Any] = {}

    def _values(self, phase: str, state: state_lib.TrainState, batch: Any) -> Any:
        prepare = getattr(self._task, "prepare_batch", None)
        if prepare is not None:
            batch = prepare(self._setup, state, batch)
        return self._task.train_step(self._setup, phase, state, batch)

    def _step(self, phase: str, state: state_lib.TrainState, totals: metrics.Totals, batch: Any) -> Any:
        state, values = self._values(phase, state, batch)
        return state, metrics.merge(totals, values)

    def zeros(self, phase: str, state: state_lib.TrainState, batch: Any) -> metrics.Totals:
        """Empty totals of a phase, laid out as the step returns them (so that the step compiles once)."""
        if phase not in self._shapes:
            _, self._shapes[phase] = jax.eval_shape(functools.partial(self._values, phase), state, batch)
        return jax.tree.map(lambda s: jax.device_put(jnp.zeros(s.shape, s.dtype), self._whole), self._shapes[phase])

    def flops(self, phase: str, batch: Any) -> float:
        """Model FLOPs of a step of a phase, all devices together."""
        if phase not in self._flops:
            self._flops[phase] = self._task.step_flops(self._setup, phase, batch)
        return self._flops[phase]

    def __call__(
        self, phase: str, state: state_lib.TrainState, totals: metrics.Totals, batch: Any
    ) -> tuple[state_lib.TrainState, metrics.Totals]:
        """Runs one step; the state and the totals given in are donated."""
        if phase not in self.compiled:
            self.compiled[phase] = self._jit(phase)
        return self.compiled[phase](state, totals, batch)

    def _jit(self, phase: str) -> Any:
        return jax.jit(
            functools.partial(self._step, phase), donate_argnums=(0, 1), out_shardings=(self._layout, self._whole)
        )

    def lower(self, phase: str, state: state_lib.TrainState, batch: Any) -> Any:
        """The step of a phase, lowered for abstract arguments that carry their shardings."""
        _, totals = jax.eval_shape(functools.partial(self._values, phase), state, batch)
        totals = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._whole), totals)
        return self._jit(phase).lower(state, totals, batch)
