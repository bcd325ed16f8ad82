"""What a run says of itself: learning rates, its config, lines of progress; and where it may begin again."""

import importlib.util
import io
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagegpt_jax import config as config_lib
from imagegpt_jax.checkpoint import folders
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import event_log
from imagegpt_jax.training import loop, optimizers, train_metrics

_spec = importlib.util.spec_from_file_location("tiny_task", pathlib.Path(__file__).parents[1] / "tiny_task.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

OPTIM = {
    "name": "sgd", "lr": 0.5, "schedule": "cosine", "warmup_steps": 3, "decay_start": 0, "final_lr_ratio": 0.1,
    "drops": (), "drop_factor": 0.1, "b1": 0.0, "b2": 0.9, "eps": 1e-8, "mu_dtype": "float32", "nu_dtype": "float32",
    "weight_decay": 0.0, "clip_norm": 0.0,
}  # fmt: skip


class Scheduled(tiny.Task):
    """Its gradients are 1, so that what an update subtracts is its learning rate: the metric `applied`."""

    def setup(self, config):
        made = optimizers.make(config.optim, config.steps, {"slope": (None,)})
        return tiny.Setup(config, {"line": tiny.NETWORK}, {"line": made}, {})

    def train_step(self, setup, phase, old, batch):
        _, values = super().train_step(setup, phase, old, batch)
        ones = jax.tree.map(jnp.ones_like, old.trainable["line"])
        updates, opt = setup.optimizers["line"].update(ones, old.opt["line"], old.trainable["line"])
        params = optax.apply_updates(old.trainable["line"], updates)
        new = tiny.dataclasses.replace(old, step=old.step + 1, trainable={"line": params}, opt={"line": opt})
        return new, {**values, "applied": train_metrics.mean(-updates["slope"])}


def rates(setup, updates):
    return {"learning_rate": optimizers.learning_rate(setup.config.optim, setup.config.steps, updates["train"])}


def lines(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_learning_rate_is_that_of_the_update_also_after_steps_that_were_left_out(tmp_path):
    config = tiny.make_config(optim=OPTIM)
    loop.run(Scheduled(bad=[9, 17], learning_rates=rates), config, tmp_path)  # of steps 3 and 5
    logged = {line["step"]: line for line in lines(tmp_path) if "train/learning_rate" in line}
    updated = [step for step, line in logged.items() if "train/applied" in line]
    assert updated == [1, 2, 4, 6, 7, 8, 9, 10, 11, 12]
    for step in updated:
        assert logged[step]["train/learning_rate"] == pytest.approx(logged[step]["train/applied"], rel=1e-6)
    assert len({line["train/learning_rate"] for line in logged.values()}) == 10
    assert logged[3]["train/learning_rate"] == logged[2]["train/learning_rate"]  # no update: the one before


def test_before_the_first_update_there_is_no_learning_rate():
    config = tiny.make_config(optim=OPTIM)
    assert np.isnan(optimizers.learning_rate(config.optim, 12, jnp.asarray(0)))


def test_the_config_is_in_tensorboard_and_in_the_events(tmp_path):
    config = tiny.make_config(steps=2, optim=OPTIM)
    loop.run(tiny.Task(), config, tmp_path)
    assert event_log.read(tmp_path)[0]["config"] == config_lib.to_dict(config)
    (board,) = tmp_path.glob("events.out.tfevents*")
    assert b'"warmup_steps": 3' in board.read_bytes()


def test_a_log_gets_a_line_for_each_interval(tmp_path, capsys):
    loop.run(tiny.Task(), tiny.make_config(log_every=4), tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("line: step")]
    assert [line.split(",")[0] for line in said] == [f"line: step {step}/12" for step in (4, 8, 12)]
    assert all("loss " in line and "steps/s" in line and " left" in line and "\r" not in line for line in said)


def test_a_terminal_keeps_its_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    loop.run(tiny.Task(), tiny.make_config(log_every=4), tmp_path)
    assert "\rline: 100%" in terminal.getvalue()
    assert "line: step" not in terminal.getvalue()


# ------------------------------------------------------------------------------------------------ a workdir used again


class Stopped(Exception):
    pass


def stop_at(step):
    def hook(drawn):
        if drawn == step:
            raise Stopped

    return hook


def test_a_run_that_failed_before_its_first_checkpoint_leaves_room_for_another(tmp_path, capsys):
    with pytest.raises(Stopped):
        loop.run(tiny.Task(hook=stop_at(2)), tiny.make_config(seed=1), tmp_path)
    assert (tmp_path / "config.json").exists()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 5.0}\n')
    state = loop.run(tiny.Task(), tiny.make_config(steps=4), tmp_path)
    assert "made no checkpoint" in capsys.readouterr().err
    assert config_lib.load(tmp_path).seed == 0
    assert int(state.step) == 4
    fresh = loop.run(tiny.Task(), tiny.make_config(steps=4), tmp_path / "fresh")
    jax.tree.map(np.testing.assert_array_equal, state, fresh)
    assert lines(tmp_path) == lines(tmp_path / "fresh")


def test_a_run_with_a_checkpoint_keeps_its_workdir(tmp_path):
    with pytest.raises(Stopped):
        loop.run(tiny.Task(hook=stop_at(5)), tiny.make_config(seed=1), tmp_path)
    held = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="another config"):
        loop.run(tiny.Task(), tiny.make_config(), tmp_path)
    assert held == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("files", "saved"),
    [
        ([], False),
        (["8/manifest.json.tmp", "8/state/a"], False),  # a first save that was cut off
        (["8/manifest.json"], True),
        (["8/state/a"], True),  # its manifest was lost
        (["8/manifest.json.deleted"], True),
        (["damaged/8/manifest.json"], True),
        (["8/manifest.json.tmp", "16/manifest.json"], True),
    ],
)
def test_what_counts_as_having_had_a_checkpoint(files, saved, tmp_path):
    for name in files:
        path = tmp_path / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert folders.ever_saved(tmp_path) == saved
