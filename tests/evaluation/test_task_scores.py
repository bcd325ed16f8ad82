"""Scoring a run of a task from outside the package: by its own evaluators, under its own names."""

import json
import pathlib

import pytest

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax import config as config_lib
from imagegpt_jax.errors import UserError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A workdir of the smallest task, as a user's own module that is a "line", with checkpoints of steps 1 and 2."""
    (tmp_path / "outside_line").mkdir()
    (tmp_path / "outside_line" / "__init__.py").write_text("")
    (tmp_path / "outside_line" / "task.py").write_text(
        "import tiny_task\n\n\nTASK = tiny_task.Task()\nobject.__setattr__(TASK, 'kind', 'line')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1]))
    import tiny_task

    config = tiny_task.make_config(task="outside_line.task")
    task = tiny_task.Task()
    setup = task.setup(config)
    config_lib.save(config, tmp_path / "run")
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", config)
    shapes = train_state.abstract(task.init_state, setup)
    for step in (1, 2):
        checkpoints.save(step, _filled(shapes, float(step)), position=0)
    checkpoints.close()
    return tmp_path / "run"


def _filled(shapes, value):
    import jax
    import numpy as np

    return jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), shapes)


def test_a_task_of_ones_own_is_scored_by_its_own_evaluators(run, binary, tmp_path):
    def evaluate(*flags):
        binary("evaluate", f"--checkpoint={run}", *flags, f"--output={tmp_path / 'scores.json'}").main()
        return json.loads((tmp_path / "scores.json").read_text())

    scores = evaluate(f"--report={tmp_path / 'page.html'}")
    # The evaluator's score is the sum of three slopes, of the moving average.
    assert scores["line/validation/loss"] == 6.0
    assert (scores["line/task"], scores["line/step"], scores["line/checkpoint"]) == ("outside_line.task", 2, str(run))
    assert "line/validation/loss" in (tmp_path / "page.html").read_text()
    assert evaluate("--step=1")["line/validation/loss"] == 3.0
    with pytest.raises(UserError, match=r"--ops is not possible here: the config of .* has no data.eval_ops"):
        evaluate("--ops=decode")
    with pytest.raises(UserError, match="both a line"):
        evaluate(f"--checkpoint={run}")
