"""The only training loop, shared by all tasks, which it asks for what differs (`tasks.interface.Task`).

One compiled step per phase; metrics stay on the device and those of an interval are fetched after the next step has
been dispatched.
"""

import contextlib
import dataclasses
import functools
import io
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax import config as config_lib
from imagegpt_jax.checkpoint import folders
from imagegpt_jax.config import Config
from imagegpt_jax.data import holdout, quarantine
from imagegpt_jax.data.pipeline import position_after
from imagegpt_jax.errors import UserError
from imagegpt_jax.parallel import sharding
from imagegpt_jax.runtime import distributed, event_log, filesystem, hardware, preemption, progress
from imagegpt_jax.training import config_checks, step_guard, summary, train_metrics
from imagegpt_jax.training.steps import Steps, host_batch
from imagegpt_jax.training.warm_start import load_params

if TYPE_CHECKING:
    from imagegpt_jax.metrics.evaluator import Evaluator
    from imagegpt_jax.tasks.interface import Batches, Task


def run(
    task: "Task", config: Config, workdir: epath.PathLike, *, allow_changes: bool = False
) -> train_state.TrainState:
    """Trains a task to `config.steps`, from the newest checkpoint of the workdir that verifies, if there is one.

    When `runtime.preemption.current` is given notice, it saves and returns early.

    Args:
      task: what is trained, as `tasks.interface.find` gives it.
      config: its config.
      workdir: folder for checkpoints, logs and pictures.
      allow_changes: whether to go on with a run that had another config.

    Returns:
      The last TrainState.

    Raises:
      UserError: for a config, data set or workdir that cannot work; before any step, leaving nothing behind.
    """
    # --- Everything a person can get wrong, before devices and files.
    begins, config = not folders.ever_saved(workdir), holdout.resolve(config)
    changes = config_lib.check_workdir(config, workdir, allow_changes=allow_changes or begins)
    config_checks.check_loop(config)
    setup = task.setup(config) if begins else task.resume(config_lib.take_stored(config, workdir), workdir)
    config = setup.config  # with what it took from the data
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
    sharding.check_batch_size(config.eval_batch_size, mesh, key="eval_batch_size")
    task.check_mesh(setup, mesh)
    config_checks.check_start(task, setup, workdir, mesh)
    distributed.assert_equal(config=config_lib.to_dict(config), workdir=str(workdir), **task.facts(setup))

    with jax.set_mesh(mesh):
        # --- State: born sharded, or restored onto the same shardings.
        make = functools.partial(task.init_state, setup)
        state, layout = train_state.init_sharded(make, setup.networks, mesh, config.seed)
        if distributed.is_main_process():
            if begins and changes:
                print(f"note: the run in {workdir} made no checkpoint; this config takes its place.", file=sys.stderr)
            with filesystem.writing(workdir):
                config_lib.save(config, workdir)
                if begins:
                    task.save_assets(setup, workdir)
            print(summary.text(task, setup, workdir, begins), file=sys.stderr)
        distributed.wait_for_file(epath.Path(workdir) / "config.json")
        log = event_log.Log(workdir if distributed.is_main_process() else None)
        facts = {"task": config.task, "devices": mesh.size, "processes": jax.process_count()}
        log.write("start", **facts, config_changes=changes, config=config_lib.to_dict(config))
        quarantine.attach(setup.sources, config.data.quarantine, quarantine.Report(workdir, jax.process_index(), log))
        checkpoints = checkpoint.Checkpoints(workdir, config, log)
        restored = checkpoints.restore(state)
        begin = (
            ResumePoint.at(*restored)
            if restored is not None
            else ResumePoint(_load_pretrained(task, setup, state, layout, log), 0)
        )
        writer = train_metrics.Writer(workdir, int(begin.state.step))
        writer.text(int(begin.state.step), "config", config_lib.to_text(config))
        with (
            _closing(writer),
            _closing(checkpoints),
            distributed.watched(workdir, log),
            distributed.failing_jointly(),
        ):
            state = _Training(task, setup, mesh, layout, checkpoints, writer, log, workdir).run(begin)
            checkpoints.finish(int(state.step))
            log.write("exit", step=int(state.step), why="preempted" if preemption.current.given else "finished")
    return state


def _load_pretrained(
    task: "Task", setup: Any, state: train_state.TrainState, layout: train_state.TrainState, log: event_log.Log
) -> train_state.TrainState:
    """A new state with what it takes over from others: frozen networks, and the parameters that it begins with."""
    state = task.load_frozen(setup, state, layout)
    return load_params(state, setup.config, task.weights(setup), log) if setup.config.init_from else state


@contextlib.contextmanager
def _closing(thing: Any) -> Iterator[None]:
    """Closes something at the end; of two errors the first is the one that is told."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            thing.close()
        raise
    thing.close()


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where training begins or goes on.

    Attributes:
      state: the state there.
      position: examples drawn from the data.
      skipped: windows of positions that are left out.
      evaluated: whether the evaluation that is due after this step, if any, is done.
    """

    state: train_state.TrainState
    position: int
    skipped: tuple[tuple[int, int], ...] = ()
    evaluated: bool = True

    @classmethod
    def at(cls, state: train_state.TrainState, manifest: checkpoint.Manifest) -> "ResumePoint":
        """At a checkpoint."""
        return cls(state, manifest.position, manifest.skipped, manifest.evaluated)


class _Rollback(Exception):
    """Too many bad steps in a row, of which `first` was the first."""

    def __init__(self, first: int):
        super().__init__(first)
        self.first = first


@dataclasses.dataclass
class _Training:
    """A run once everything is set up."""

    task: "Task"
    setup: Any
    mesh: jax.sharding.Mesh
    layout: train_state.TrainState
    checkpoints: checkpoint.Checkpoints
    writer: train_metrics.Writer
    log: event_log.Log
    workdir: epath.PathLike

    def __post_init__(self) -> None:
        self.config: Config = self.setup.config
        self.steps = Steps(self.task, self.setup, self.mesh, self.layout)
        self.chip = hardware.chip_of(jax.devices()[0].device_kind)
        self.clock = train_metrics.Throughput(self.mesh.size, None if self.chip is None else self.chip.flops)
        self.scores: dict[str, float] = {}
        # A program of its own, so that the step's stays as it is.
        self.learning_rates = jax.jit(self._learning_rates, out_shardings=sharding.replicated(self.mesh))

    def _learning_rates(self, guard: Mapping[str, Mapping[str, Any]]) -> train_metrics.Totals:
        rates = self.task.learning_rates(self.setup, {phase: state["count"] for phase, state in guard.items()})
        return {name: train_metrics.mean(rate) for name, rate in rates.items()}

    @functools.cached_property
    def evaluators(self) -> "Sequence[Evaluator]":
        """What scores the run, constructed when it is first asked for."""
        return self.task.evaluators(self.setup, self.mesh)

    def run(self, begin: ResumePoint) -> train_state.TrainState:
        """Trains to the end, going back whenever the guard trips."""
        for _ in range(self.config.guard.max_rollbacks + 1):
            try:
                return self._train(begin)
            except _Rollback as e:
                begin = self._roll_back(begin, e.first)
        raise UserError(
            f"training went wrong again after {self.config.guard.max_rollbacks} rollbacks, last at step"
            f" {int(begin.state.step)}: the cause is not in the data; try a lower config.optim.lr or"
            f" config.optim.clip_norm, or see what {self.workdir}/bad_batches holds with tools/replay.py."
        )

    # ------------------------------------------------------------------------------------------------------- going on

    def _train(self, begin: ResumePoint) -> train_state.TrainState:
        config, task, setup, last = self.config, self.task, self.setup, self.config.steps
        state, first = begin.state, int(begin.state.step)
        self._first, self.skipped_steps = first, step_guard.skipped(state.guard)
        batches = self._open(begin.position, begin.skipped)
        stream = iter(batches)
        # What rollouts gave for steps that are not judged yet: the state that they came from is gone by then.
        self._rolled_out: dict[int, Mapping[str, Any]] = {}
        self._where = functools.partial(self._position_of, begin, first)
        totals: Any = None
        pending: tuple[int, Any] | None = None
        bar = tqdm(
            total=last,
            initial=first,
            desc=config.task,
            unit="step",
            disable=jax.process_index() != 0 or None,  # None: where stderr is no terminal, `_write` prints lines
            mininterval=1.0,
        )
        try:
            if not begin.evaluated:
                self._evaluate(first, state)
            for step in range(first + 1, last + 1):
                # --- Dispatch one step.
                started = time.perf_counter()
                held = host_batch(task, setup, state, self._where(step - 1), stream)
                if task.rollout is not None:
                    self._rolled_out[step - 1] = held
                batch = sharding.put_batch(held, self.mesh)
                self.clock.add("data_wait", time.perf_counter() - started)
                phase = task.phase(setup, step - 1)
                if totals is None:
                    totals = self.steps.zeros(phase, state, batch)
                compiling = phase not in self.steps.compiled
                started = time.perf_counter()
                state, totals = self.steps(phase, state, totals, batch)
                if compiling:
                    self.log.write("compile", step=step, phase=phase, seconds=time.perf_counter() - started)
                tokens = task.tokens(setup, batch)
                flops = self.steps.flops(phase, batch) if self.chip is not None else 0.0
                bar.update()
                self.checkpoints.poll()
                distributed.progress(step)

                # --- Metrics of the interval before, while this step runs.
                if pending is not None:
                    self._write(*pending, bar)
                    pending = None
                self.clock.count(config.batch_size, tokens, flops)  # this step is of the interval after
                if step % config.log_every == 0 or step == last or task.phase(setup, step) != phase:
                    totals["metrics"] |= self.learning_rates(totals["guard"])
                    pending, totals = (step, totals), None

                # --- Evaluations and checkpoints.
                stop = preemption.current.reached()
                evaluate = step == last or (config.eval_every > 0 and step % config.eval_every == 0)
                if pending is not None and (evaluate or stop):  # what waits for the steps before it is not their time
                    self._write(*pending, bar)
                    pending = None
                evaluated = True
                if evaluate:
                    evaluated = not stop and self._evaluate(step, state)
                stop = preemption.current.given
                if self.checkpoints.due(step, last) or stop:
                    self._save(step, state, batches.position, begin.skipped, evaluated)
                if stop:
                    self.log.write("preempted", step=step)
                    return state
            if pending is not None:
                self._write(*pending, bar)
        finally:
            bar.close()
            batches.close()
        return state

    def _open(self, position: int, skipped: tuple[tuple[int, int], ...]) -> "Batches":
        """This process's rows of the training batches from a position on."""
        size = self.config.batch_size
        rows = sharding.host_rows(self.mesh, size)
        return self.task.batches(self.setup, "train", batch_size=size, position=position, rows=rows, skipped=skipped)

    def _position_of(self, begin: ResumePoint, first: int, step: int) -> int:
        """Where the batch of a step (counted from 0) begins."""
        return position_after(begin.position, step - first, self.config.batch_size, begin.skipped)

    def _write(self, step: int, finished: Any, bar: tqdm) -> None:
        values = {f"train/{k}": v for k, v in train_metrics.fetch(finished["metrics"]).items()}
        skipped = step_guard.skipped(finished["guard"])
        values["train/skipped_steps"] = float(skipped)
        values = {k: v for k, v in values.items() if math.isfinite(v)}  # no step of the interval counted
        self.writer.scalars(step, values)
        timing = self.clock.read()
        self.writer.scalars(step, timing, file="timing")
        shown = {k: f"{values[f'train/{k}']:.4g}" for k in self.task.progress_metrics if f"train/{k}" in values}
        bar.set_postfix(shown, refresh=False)
        if bar.disable and distributed.is_main_process():
            steps_per_second = timing["timing/examples_per_second"] / self.config.batch_size
            progress.print_step(self.config.task, step, self.config.steps, shown, steps_per_second)
        self.log.write("steps", step=step, **self.clock.last)
        if skipped > self.skipped_steps:
            newest = step_guard.newest(finished["guard"])
            self.log.write("skip", step=step, steps=skipped - self.skipped_steps, newest=newest)
            self._keep_batch(newest)
            self.skipped_steps = skipped
        self._rolled_out = {number: batch for number, batch in self._rolled_out.items() if number >= step}
        if (first := step_guard.rollback_from(finished["guard"])) is not None:
            raise _Rollback(first)

    def _evaluate(self, step: int, state: train_state.TrainState) -> bool:
        """Scores the validation split; False if notice of preemption came in between."""
        started = time.perf_counter()
        params = {name: state.eval_params(name) for name in state.trainable}
        try:
            evaluations = [evaluator.evaluate(params, step) for evaluator in self.evaluators]
        except preemption.Preempted:
            return False
        self.scores = {name: value for each in evaluations for name, value in each.scores.items()}
        self.writer.scalars(step, self.scores)
        self.writer.images(step, {name: image for each in evaluations for name, image in each.images.items()})
        self.clock.add("evaluation", time.perf_counter() - started)
        self.log.write("evaluation", step=step, seconds=time.perf_counter() - started)
        return True

    def _save(
        self,
        step: int,
        state: train_state.TrainState,
        position: int,
        skipped: tuple[tuple[int, int], ...],
        evaluated: bool,
    ) -> None:
        # What is saved is good; to know that, the steps before it are waited for, which is their time.
        if (first := step_guard.rollback_from(state.guard)) is not None:
            raise _Rollback(first)
        started = time.perf_counter()
        self.checkpoints.save(step, state, position, skipped, self.scores, evaluated)
        self.clock.add("checkpoint", time.perf_counter() - started)

    # ------------------------------------------------------------------------------------------------------ going back

    def _keep_batch(self, step: int) -> None:
        """Saves this process's rows of the batch of a bad step; `tools/replay.py` runs it again."""
        batch = self._rolled_out.get(step)
        if batch is None:
            batches = self._open(self._where(step), ())
            batch = next(iter(batches))
            batches.close()
        file = io.BytesIO()
        arrays: dict[str, Any] = {k: v.astype(str) if v.dtype == object else v for k, v in batch.items()}
        np.savez(file, **arrays)
        folder = epath.Path(self.workdir) / "bad_batches"
        with filesystem.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"step-{step}.process-{jax.process_index()}.npz").write_bytes(file.getvalue())

    def _roll_back(self, begin: ResumePoint, first: int) -> ResumePoint:
        """The newest checkpoint, or the start, without the window of the data in which the bad steps began."""
        first = max(first, self._first)  # what was drawn before is not drawn again
        window = (self._where(first), self._where(first + self.config.guard.patience))
        self.checkpoints.wait()
        restored = self.checkpoints.restore(begin.state)
        if restored is not None:
            resumed = ResumePoint.at(*restored)
        else:
            make = functools.partial(self.task.init_state, self.setup)
            state, _ = train_state.init_sharded(make, self.setup.networks, self.mesh, self.config.seed)
            resumed = ResumePoint(_load_pretrained(self.task, self.setup, state, self.layout, self.log), 0)
        state = dataclasses.replace(resumed.state, guard=step_guard.reset(resumed.state.guard))
        to = int(state.step)
        self.log.write("rollback", step=first + self.config.guard.patience, to=to, skipped_positions=window)
        self.writer.rewind(to)
        return dataclasses.replace(resumed, state=state, skipped=_with_window(resumed.skipped, begin.skipped, window))


def _with_window(*windows: Any) -> tuple[tuple[int, int], ...]:
    """The union of windows of positions, ascending and apart."""
    *lists, new = windows
    merged: list[tuple[int, int]] = []
    for first, end in sorted({*(w for ws in lists for w in ws), new}):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)
