"""Scores of a run by the evaluators of its own task, those that scored it while it trained."""

import jax
from etils import epath
from jax.sharding import Mesh

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax.errors import UserError
from imagegpt_jax.evaluation import checkpoint_data
from imagegpt_jax.evaluation.checkpoint_data import Page, Scores, Settings
from imagegpt_jax.parallel import sharding
from imagegpt_jax.tasks import interface


class TaskScorer:
    """A run of a task that has evaluators."""

    def __init__(self, settings: Settings, path: str):
        """Opens the task's data, or --data with --ops; raises UserError if it cannot, or has no evaluators."""
        self._settings, self._path = settings, path
        config = checkpoint_data.config_of(path)
        for flag, key, value in (("data", "validation", settings.data), ("ops", "eval_ops", settings.ops)):
            if value and key not in config.get("data", {}):
                raise UserError(f"--{flag} is not possible here: the config of {path} has no data.{key}.")
            if value:
                config.data[key] = value
        self._config, self._task = config, interface.find(config.task)
        self._setup = self._task.resume(config, epath.Path(path))

    def score(self, mesh: Mesh, page: Page) -> Scores:
        """The evaluators' scores, after the kind of the task."""
        task, setup, path = self._task, self._setup, self._path
        step = checkpoint.choose_step(path, self._settings.step)
        abstract = train_state.abstract(task.init_state, setup)
        sharding.check_batch_size(self._config.eval_batch_size, mesh, key="eval_batch_size")
        with jax.set_mesh(mesh):
            params: dict[str, train_state.Params] = {}
            for name in abstract.trainable:
                whole = jax.tree.map(lambda _: sharding.replicated(mesh), abstract.params(name))
                params[name] = checkpoint.load_params(path, abstract, name, step, whole)
            evaluations = [evaluator.evaluate(params, step) for evaluator in task.evaluators(setup, mesh)]
        scores: Scores = {"checkpoint": path, "step": step, "task": self._config.task}
        for evaluation in evaluations:
            scores |= evaluation.scores
            for name, images_NHWC in evaluation.images.items():
                page.pictures[name.replace("/", "_")] = images_NHWC[0]
        if not any(evaluation.scores for evaluation in evaluations):
            raise UserError(
                f"config.task={self._config.task!r} has no evaluators that score: give Task(evaluators=...)."
            )
        return {f"{task.kind}/{name}": value for name, value in scores.items()}
