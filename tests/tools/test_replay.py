"""A step is run again, and shows what it showed."""

import importlib.util
import json
import pathlib
import types

import numpy as np
import pytest

from imagegpt_jax import config as config_lib
from imagegpt_jax.tasks import interface
from imagegpt_jax.training import loop

_spec = importlib.util.spec_from_file_location("tiny_task", pathlib.Path(__file__).parents[1] / "tiny_task.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


@pytest.fixture
def replay(load_tool):
    return load_tool("replay.py")


def test_a_bad_step_is_run_again(replay, tmp_path, monkeypatch, capsys):
    task = tiny.Task(bad=[21])
    loop.run(task, tiny.make_config(), tmp_path)
    monkeypatch.setattr(interface, "find", lambda name: task)
    monkeypatch.setattr(replay, "WORKDIR", types.SimpleNamespace(value=tmp_path))
    monkeypatch.setattr(replay, "STEP", types.SimpleNamespace(value=5))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    replay.main()
    output = capsys.readouterr()
    assert "from the checkpoint of step 4, 1 steps before" in output.err
    assert "step 5 (train), positions 20 to 23" in output.out
    assert "y: float32 (4,), from" in output.out
    assert "1 NOT FINITE" in output.out
    assert "loss = nan" in output.out
    assert "NOT FINITE after the step: trainable['line']['slope'], 3 of 3" in output.out
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_good_step_has_the_loss_it_had(replay, tmp_path, monkeypatch, capsys):
    task = tiny.Task()
    loop.run(task, tiny.make_config(), tmp_path)
    monkeypatch.setattr(interface, "find", lambda name: task)
    monkeypatch.setattr(replay, "WORKDIR", types.SimpleNamespace(value=tmp_path))
    monkeypatch.setattr(replay, "STEP", types.SimpleNamespace(value=6))
    replay.main()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = next(line["train/loss"] for line in lines if line["step"] == 7)
    output = capsys.readouterr().out
    np.testing.assert_allclose(float(output.split("loss = ")[1].split()[0]), expected, rtol=1e-5)
    assert "NOT FINITE" not in output
    assert config_lib.load(tmp_path).task == "line"
