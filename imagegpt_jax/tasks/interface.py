"""What a task is: the one place that says what can be trained here, and how to get it by the name in a config.

A module offers a task as `TASK = interface.Task(...)`. Ours are named by a word, a user's own by its dotted module:
`config.task="my_package.my_task"`. Everything outside `tasks/` asks the task; nothing compares its name.

This module imports nothing heavy, so that a misspelt name is an error before JAX starts.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from imagegpt_jax import plugins
from imagegpt_jax.errors import UserError

if TYPE_CHECKING:
    import jax
    import numpy as np
    from etils import epath
    from jax.sharding import Mesh

    from imagegpt_jax.config import Config
    from imagegpt_jax.metrics.evaluator import Evaluator
    from imagegpt_jax.train_state import Network, TrainState

# Name -> module of the tasks that come with this package.
TASKS = {name: f"imagegpt_jax.tasks.{name}" for name in ("tokenizer", "decoder")}


class Setup(Protocol):
    """What the loop reads of a task's setup; a task's own may hold more.

    Attributes:
      config: the run's config.
      networks: name -> network, trained and frozen.
      optimizers: name -> optimizer, of the networks that are trained.
      sources: split -> opened source; empty where no data are opened.
    """

    config: Config
    networks: Mapping[str, Network]
    optimizers: Mapping[str, Any]
    sources: Mapping[str, Any]


class Batches(Protocol):
    """The endless training batches of one process, or those of one pass; `data.pipeline.Batches` is one.

    Attributes:
      position: examples drawn up to the end of the last batch that was given out.
    """

    position: int

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def close(self) -> None:
        """Ends the threads that prefetch."""
        ...


S = TypeVar("S")
Batch = Mapping[str, Any]


def _check_layout(setup: Any, mesh: Mesh) -> None:
    from imagegpt_jax import train_state

    train_state.check_layout(setup.networks, mesh)


def _no_shapes(setup: Any, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    del batch_size
    raise UserError(f"the task {setup.config.task} gives no shapes of its batches: set abstract_batch in its TASK.")


def _facts(setup: Any) -> dict[str, Any]:
    return {"data": [source.fingerprint for source in setup.sources.values()]}


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a config on a slice, abstract up to its compilation.

    Attributes:
      name: the phase of a training step, or "prefill", "decode" (sampling).
      lower: traces it: () -> jax.stages.Lowered.
      model_flops: FLOPs that the model needs, all devices together.
      parameters: () -> tree of all that it is given, trained and frozen, with shardings.
      reads: where nearly all it moves is known, () -> name -> bytes that one device reads once.
      trains: whether it is a training step.
    """

    name: str
    lower: Callable[[], Any]
    model_flops: float
    parameters: Callable[[], Any]
    reads: Callable[[], dict[str, int]] | None = None
    trains: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perf(Generic[S]):
    """What a task tells those who compile its programs for slices that are not there (`perf/aot.py`).

    Attributes:
      inputs: config -> what its training step is given, such as "images" or "tokens".
      with_inputs: (config, inputs) -> config whose step is given those.
      setup: config -> the abstract setup whose step is compiled; None = the task's `setup_abstract`.
      programs: (setup, mesh, abstract state) -> programs besides the training steps.
      remats: values of `config.model.remat`, from cheapest in time to cheapest in memory.
      frozen_reads: setup -> frozen network -> whether the step reads each of its parameters, in the order of leaves.
      kept_activations: config -> numbers of one example that the backward pass keeps at the least; 0 = not known.
      summed_activations: (setup, rows) -> numbers that a step of a device's rows sums over `tensor`.
      sequence: setup -> (length, size of the vocabulary), whose products a step must not hold whole; None = none.
    """

    inputs: Callable[[Config], str] = lambda config: "images"
    with_inputs: Callable[[Config, str], Config] = lambda config, inputs: config
    setup: Callable[[Config], S] | None = None
    programs: Callable[[S, Mesh, TrainState], Iterable[Program]] = lambda setup, mesh, state: ()
    remats: tuple[Any, ...] = (False, True)
    frozen_reads: Callable[[S], dict[str, list[bool]]] = lambda setup: {}
    kept_activations: Callable[[Config], int] = lambda config: 0
    summed_activations: Callable[[S, int], int] = lambda setup, rows: 0
    sequence: Callable[[S], tuple[int, int]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Generic[S]):
    """What can be trained: functions of a setup of the task's own type `S` (see `Setup`).

    Required are the first four; what the others default to is what most tasks want.

    Attributes:
      setup: config -> setup: checks the config, opens the data; raises UserError for what cannot work. What is None in
        the config it may take from the data; `setup.config` then has it, and is kept with the run.
      init_state: (setup, key) -> first TrainState; pure.
      train_step: (setup, phase, state, batch) -> (next state, metrics of `training.train_metrics`); pure. One of the
        metrics is "loss", which the guard watches.
      batches: (setup, split, *, batch_size, position, rows, skipped) -> `Batches`, as `tasks.input.batches`.
      resume: (config, workdir) -> setup of a run that goes on, which keeps what it took from its data when it began; by
        default `setup`.
      kind: what its workdirs load as: "tokenizer", "decoder", or a word of its own.
      network: the network that its workdirs load and published weights of this kind go into; "" = the first that is
        trained.
      setup_for_inference: (config, workdir) -> setup of a finished run, without data; by default `setup_abstract`.
      setup_abstract: config -> setup with shapes alone, without data; by default `setup`.
      phase: (setup, number of the step from 0) -> name of the compiled step that runs.
      phases: setup -> all values of `phase`.
      check_mesh: (setup, mesh): raises UserError if the networks cannot be sharded over the mesh.
      evaluators: (setup, mesh) -> what scores the networks while they train, in order.
      learning_rates: (setup, phase -> updates that counted so far, on the devices) -> name -> learning rate of the
        newest update, as `training.optimizers.learning_rate` gives it; logged beside the training metrics.
      progress_metrics: training metrics beside the progress bar.
      finite_metrics: those that show any NaN of an update: a step in which one is not finite is left out.
      prepare_batch: (setup, state, batch) -> batch, on the devices, within the step.
      rollout: (setup, state, position) -> this process's rows of the step's batch, or None for those of the data. It
        runs on the host before the step, with the state of that moment; as a function of (state, position, config)
        alone it leaves resuming exact.
      load_frozen: (setup, new state, shardings) -> state with the parameters of networks that other runs trained.
      check_frozen: setup: raises UserError if those parameters are not there.
      abstract_batch: (setup, batch size) -> shapes of a training batch, to compile its step ahead of time.
      perf: what is asked when its programs are compiled ahead of time.
      tokens: (setup, batch) -> tokens of a batch, for the throughput; 0 where there are none.
      step_flops: (setup, phase, batch) -> model FLOPs of a step, all devices together; 0 = not known.
      save_assets: (setup, workdir): writes what inference needs besides config and checkpoints.
      assets: names of the files and folders that `save_assets` writes, which an export takes along.
      facts: setup -> what a run is made of besides its config: the same on every process.
      notes: setup -> (what, in words) of what is told before the first step.
    """

    setup: Callable[[Config], S]
    init_state: Callable[[S, jax.Array], TrainState]
    train_step: Callable[[S, str, TrainState, Any], tuple[TrainState, Any]]
    batches: Callable[..., Batches]
    resume: Callable[[Config, epath.PathLike], S] = dataclasses.field(default=cast(Any, None))
    kind: str = "model"
    network: str = ""
    setup_for_inference: Callable[[Config, epath.PathLike], S] = dataclasses.field(default=None)  # type: ignore[assignment]
    setup_abstract: Callable[[Config], S] = dataclasses.field(default=None)  # type: ignore[assignment]
    phase: Callable[[S, int], str] = lambda setup, step: "train"
    phases: Callable[[S], tuple[str, ...]] = lambda setup: ("train",)
    check_mesh: Callable[[S, Mesh], None] = _check_layout
    evaluators: Callable[[S, Mesh], Sequence[Evaluator]] = lambda setup, mesh: ()
    learning_rates: Callable[[S, Mapping[str, Any]], dict[str, Any]] = lambda setup, updates: {}
    progress_metrics: tuple[str, ...] = ("loss",)
    finite_metrics: tuple[str, ...] = ("loss", "gradient_norm")
    prepare_batch: Callable[[S, TrainState, Any], Any] = lambda setup, state, batch: batch
    rollout: Callable[[S, TrainState, int], Batch | None] | None = None
    load_frozen: Callable[[S, TrainState, TrainState], TrainState] = lambda setup, state, layout: state
    check_frozen: Callable[[S], None] = lambda setup: None
    abstract_batch: Callable[[S, int], dict[str, jax.ShapeDtypeStruct]] = _no_shapes
    perf: Perf[S] = Perf()
    tokens: Callable[[S, Batch], int] = lambda setup, batch: 0
    step_flops: Callable[[S, str, Batch], float] = lambda setup, phase, batch: 0.0
    save_assets: Callable[[S, epath.PathLike], None] = lambda setup, workdir: None
    assets: tuple[str, ...] = ()
    facts: Callable[[S], dict[str, Any]] = _facts
    notes: Callable[[S], Iterable[tuple[str, str]]] = lambda setup: ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if str(field.type).startswith("Callable") and value is not None and not callable(value):
                raise UserError(f"Task({field.name}={value!r}) is not callable: {field.name} is a function.")
        if self.resume is None:
            object.__setattr__(self, "resume", lambda config, workdir: self.setup(config))
        if self.setup_abstract is None:
            object.__setattr__(self, "setup_abstract", self.setup)
        if self.setup_for_inference is None:
            object.__setattr__(self, "setup_for_inference", lambda config, workdir: self.setup_abstract(config))

    def weights(self, setup: S) -> tuple[str, str]:
        """The network that published weights go into, and their kind."""
        return self.network or next(iter(setup.optimizers)), self.kind  # type: ignore[attr-defined]


def locate(name: str) -> str:
    """The module of a task, not imported yet. Raises UserError for a name that is neither one of ours nor a module."""
    return TASKS[name] if name in TASKS else plugins.find_module(name, "config.task", TASKS)


def find(name: str) -> Task[Any]:
    """The task that a config names. Raises UserError if there is none, or what is there is no Task."""
    module = importlib.import_module(locate(name))
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        what = "has no TASK" if task is None else f"has a TASK that is a {type(task).__name__}"
        raise UserError(
            f"config.task={name!r}: {module.__file__} {what}: write TASK = interface.Task(setup=..., init_state=...,"
            " train_step=..., batches=...) there, with `from imagegpt_jax.tasks import interface`."
        )
    return task
