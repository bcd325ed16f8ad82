"""The compiled steps of a training."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from imagegpt_jax import train_state
from imagegpt_jax.errors import UserError
from imagegpt_jax.parallel import sharding
from imagegpt_jax.training import step_guard, train_metrics

if TYPE_CHECKING:
    from imagegpt_jax.tasks.interface import Task

Totals = dict[str, Any]


def compiler_options(text: str, platform: str) -> dict[str, str | bool]:
    """Options of XLA's compiler from `config.compiler_options`, such as "xla_tpu_x=false,xla_y=3".

    Those of another platform (`xla_tpu_`, `xla_gpu_`, `xla_cpu_`) are left out, so that one config runs everywhere.

    Args:
      text: "name=value,name=value"; empty for none.
      platform: that is compiled for, such as "tpu".

    Raises:
      UserError: if the text is not of that form.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    for name, equals, value in pairs:
        if not (name.startswith("xla_") and equals and value):
            raise UserError(f"compiler_options={text!r} is not of the form xla_name=value,xla_name=value.")
    others = tuple(f"xla_{other}_" for other in {"cpu", "gpu", "tpu"} - {platform})
    kept = {name: value for name, _, value in pairs if not name.startswith(others)}
    return {name: {"true": True, "false": False}.get(value, value) for name, value in kept.items()}


def check_options(text: str, platform: str) -> None:
    """Has the compiler read the options of `config.compiler_options`, with a program of nothing.

    Raises:
      UserError: if the text is not of its form, or the compiler refuses an option.
    """
    if options := compiler_options(text, platform):
        with options_told(options):
            jax.jit(lambda: 0, compiler_options=options).lower().compile()


@contextlib.contextmanager
def options_told(options: Mapping[str, str | bool]) -> Iterator[None]:
    """Turns the compiler's complaint about an option, unknown or of another kind, into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if not any(name in str(e) for name in options):
            raise
        text = ",".join(f"{name}={value}" for name, value in options.items())
        raise UserError(
            f"the compiler refuses an option of {text!r} ({str(e).splitlines()[0]}): correct it in"
            " --config.compiler_options, or leave it out."
        ) from e


def host_batch(
    task: "Task", setup: Any, state: train_state.TrainState, position: int, stream: Iterator[Any]
) -> Mapping[str, Any]:
    """This process's rows of a step's batch: those of the task's rollout, if it gives some, else the next of the data.

    Those of the data are drawn either way, so that what a rollout gives does not move the position.

    Args:
      task: what is trained.
      setup: its static part.
      state: before the step.
      position: where the batch begins in the data.
      stream: batches of the data.
    """
    drawn = next(stream)
    rolled_out = None if task.rollout is None else task.rollout(setup, state, position)
    return drawn if rolled_out is None else rolled_out


class Steps:
    """The compiled steps of a task, one per phase.

    Totals are {"metrics": merged metrics of the steps that counted, "guard": the guard's state after the last}.

    Args:
      task: what is trained.
      setup: its static part.
      mesh: the devices.
      layout: shardings of the state.

    Raises:
      UserError: for `config.compiler_options` that are not of their form; where a step is first called, for one that
        the compiler refuses.
    """

    def __init__(self, task: "Task", setup: Any, mesh: jax.sharding.Mesh, layout: train_state.TrainState):
        self._task, self._setup = task, setup
        self._layout, self._whole = layout, sharding.replicated(mesh)
        self._options = compiler_options(setup.config.compiler_options, mesh.devices.flat[0].platform)
        self._shapes: dict[str, Any] = {}
        self._flops: dict[str, float] = {}
        self.compiled: dict[str, Any] = {}

    def _values(self, phase: str, state: train_state.TrainState, batch: Any) -> Any:
        batch = self._task.prepare_batch(self._setup, state, batch)
        return self._task.train_step(self._setup, phase, state, batch)

    def _step(self, phase: str, state: train_state.TrainState, totals: Totals, batch: Any) -> Any:
        new, values = self._values(phase, state, batch)
        good, judged = step_guard.judge(
            self._setup.config.guard, state.guard[phase], state.step, values, self._task.finite_metrics
        )
        judged = {**state.guard, phase: judged}
        kept = step_guard.choose(good, new, state)
        merged = step_guard.choose(good, train_metrics.merge(totals["metrics"], values), totals["metrics"])
        return dataclasses.replace(kept, step=new.step, guard=judged), {"metrics": merged, "guard": judged}

    def _abstract_totals(self, phase: str, state: train_state.TrainState, batch: Any) -> Totals:
        if phase not in self._shapes:
            _, values = jax.eval_shape(functools.partial(self._values, phase), state, batch)
            self._shapes[phase] = {"metrics": values, "guard": jax.eval_shape(lambda: state.guard)}
        return self._shapes[phase]

    def zeros(self, phase: str, state: train_state.TrainState, batch: Any) -> Totals:
        """Empty totals of a phase, laid out as the step returns them (so that the step compiles once)."""
        shapes = self._abstract_totals(phase, state, batch)
        return jax.tree.map(lambda s: jax.device_put(jnp.zeros(s.shape, s.dtype), self._whole), shapes)

    def flops(self, phase: str, batch: Any) -> float:
        """Model FLOPs of a step of a phase, all devices together."""
        if phase not in self._flops:
            self._flops[phase] = self._task.step_flops(self._setup, phase, batch)
        return self._flops[phase]

    def __call__(
        self, phase: str, state: train_state.TrainState, totals: Totals, batch: Any
    ) -> tuple[train_state.TrainState, Totals]:
        """Runs one step; the state and the totals given in are donated."""
        if phase not in self.compiled:
            self.compiled[phase] = self._jit(phase)
            with options_told(self._options):
                return self.compiled[phase](state, totals, batch)
        return self.compiled[phase](state, totals, batch)

    def _jit(self, phase: str) -> Any:
        return jax.jit(
            functools.partial(self._step, phase),
            donate_argnums=(0, 1),
            out_shardings=(self._layout, self._whole),
            compiler_options=self._options or None,
        )

    def lower(self, phase: str, state: train_state.TrainState, batch: Any) -> Any:
        """The step of a phase, lowered for abstract arguments that carry their shardings."""
        totals = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._whole),
            self._abstract_totals(phase, state, batch),
        )
        return self._jit(phase).lower(state, totals, batch)
