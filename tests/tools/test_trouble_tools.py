"""The tools about trouble: what they count is what happened, and they see what they are there to find."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

from imagegpt_jax import checkpoint
from imagegpt_jax import config as config_lib
from imagegpt_jax.checkpoint import manifest
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import event_log
from imagegpt_jax.tasks import interface
from imagegpt_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    before = set(flags.FLAGS)
    spec.loader.exec_module(module)
    for name in set(flags.FLAGS) - before:  # several tools have flags of one name
        delattr(flags.FLAGS, name)
    return module


@pytest.fixture(scope="module")
def tools():
    return types.SimpleNamespace(
        **{
            pathlib.Path(name).stem: load(ROOT / "tools" / f"{name}.py")
            for name in ("goodput", "robustness/mutate", "replay")
        },
        tiny=load(ROOT / "tests" / "tiny_task.py"),
    )


# ------------------------------------------------------------------------------------------------------------- goodput


def event(time, kind, **facts):
    return {"time": time, "event": kind, **facts}


def steps(time, step, seconds, data=0.0, save=0.0, evaluation=0.0):
    waits = {"data_wait_seconds": data, "checkpoint_seconds": save, "evaluation_seconds": evaluation}
    return event(time, "steps", step=step, seconds=seconds, **waits)


def test_all_time_is_accounted_for(tools):
    found = tools.goodput.shares(
        [
            event(100.0, "start"),
            event(115.0, "compile", step=1, seconds=5.0),
            steps(120.0, 10, 10.0, data=1.0),
            steps(130.0, 20, 10.0, save=0.5, evaluation=2.0),
            steps(140.0, 30, 10.0),  # after the save of step 20: lost
            event(200.0, "start"),
            event(206.0, "restore", step=20, seconds=2.0),
            steps(220.0, 30, 10.0),
        ]
    )
    assert sum(found.values()) == pytest.approx(120.0)
    assert found == pytest.approx(
        {
            "steps": 4.0 + 7.5 + 10.0,
            "compile": 5.0,
            "data wait": 1.0,
            "evaluation": 2.0,
            "save": 0.5,
            "restore": 2.0,
            "lost work": 10.0,
            "start-up": 10.0 + 8.0,
            "down": 60.0,
        }
    )


def test_what_a_rollback_undoes_is_lost(tools):
    found = tools.goodput.shares(
        [
            event(0.0, "start"),
            steps(10.0, 10, 10.0),
            steps(20.0, 20, 10.0),
            event(20.0, "rollback", to=10),
            steps(30.0, 20, 10.0),
        ]
    )
    assert (found["steps"], found["lost work"]) == (20.0, 10.0)


def test_what_saving_costs_is_the_time_it_held_the_steps_up(tools):
    saves = [
        event(1.0, "save", bytes=50_000_000, blocking_seconds=seconds, background_seconds=9.0)
        for seconds in (0.1, 0.2, 0.6)
    ]
    assert tools.goodput.saving([event(0.0, "start"), *saves], 90.0) == pytest.approx(
        {"saves": 3, "megabytes": 50.0, "blocking_seconds": 0.2, "seconds_between": 30.0, "share": 0.01}
    )
    assert tools.goodput.saving([event(0.0, "start")], 90.0) == {"saves": 0}


def test_a_real_run_adds_up(tools, tmp_path):
    loop.run(tools.tiny.Task(), tools.tiny.make_config(), tmp_path)
    found = event_log.read(tmp_path)
    seconds = tools.goodput.shares(found)
    assert sum(seconds.values()) == pytest.approx(found[-1]["time"] - found[0]["time"], abs=0.05)
    assert seconds["steps"] > 0
    assert seconds["compile"] > 0


# -------------------------------------------------------------------------------------------------------------- mutate


def test_a_hundred_damaged_checkpoints_and_none_silently_wrong(tools):
    found = tools.mutate.campaign(100, seed=1)
    assert found["unexpected"] == []
    outcomes = {o: sum(kind.get(o, 0) for kind in found["outcomes"].values()) for o in ("fell back", "refused")}
    assert sum(outcomes.values()) == 100
    assert min(outcomes.values()) > 0


def test_without_verification_a_flipped_bit_comes_back_as_if_nothing_were(tools, tmp_path, monkeypatch):
    """The control: what the manifest is for."""
    config = ConfigDict({"checkpoint": {"every": 1, "keep": 0, "keep_every_hours": 0.0, "keep_best": ""}})
    state = tools.mutate.make_state(1, "float32")
    checkpoints = checkpoint.Checkpoints(tmp_path, config)
    checkpoints.save(1, state, position=1)
    checkpoints.wait()
    file = max((tmp_path / "checkpoints" / "1" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "verify", lambda *args: None)
        restored, _ = checkpoints.restore(state)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), restored, state)
    assert not all(jax.tree.leaves(same))
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.restore(state)
    checkpoints.close()


# -------------------------------------------------------------------------------------------------------------- replay


def test_a_bad_step_is_run_again(tools, tmp_path, monkeypatch, capsys):
    task = tools.tiny.Task(bad=[21])
    loop.run(task, tools.tiny.make_config(), tmp_path)
    monkeypatch.setattr(interface, "find", lambda name: task)
    monkeypatch.setattr(tools.replay, "WORKDIR", types.SimpleNamespace(value=tmp_path))
    monkeypatch.setattr(tools.replay, "STEP", types.SimpleNamespace(value=5))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    tools.replay.main()
    output = capsys.readouterr()
    assert "from the checkpoint of step 4, 1 steps before" in output.err
    assert "step 5 (train), positions 20 to 23" in output.out
    assert "y: float32 (4,), from" in output.out
    assert "1 NOT FINITE" in output.out
    assert "loss = nan" in output.out
    assert "NOT FINITE after the step: trainable['line']['slope'], 3 of 3" in output.out
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_good_step_has_the_loss_it_had(tools, tmp_path, monkeypatch, capsys):
    task = tools.tiny.Task()
    loop.run(task, tools.tiny.make_config(), tmp_path)
    monkeypatch.setattr(interface, "find", lambda name: task)
    monkeypatch.setattr(tools.replay, "WORKDIR", types.SimpleNamespace(value=tmp_path))
    monkeypatch.setattr(tools.replay, "STEP", types.SimpleNamespace(value=6))
    tools.replay.main()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = next(line["train/loss"] for line in lines if line["step"] == 7)
    output = capsys.readouterr().out
    np.testing.assert_allclose(float(output.split("loss = ")[1].split()[0]), expected, rtol=1e-5)
    assert "NOT FINITE" not in output
    assert config_lib.load(tmp_path).task == "line"


# ------------------------------------------------------------------------------------------------------------- reshard


def test_a_few_pairs_of_meshes(tmp_path):
    command = [sys.executable, "tools/robustness/reshard.py", "--pairs=3", f"--output={tmp_path / 'pairs.json'}"]
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "pairs.json").read_text())
    assert {task: (c["pairs"], c["different"]) for task, c in found.items()} == {
        "tokenizer": (3, []),
        "decoder": (3, []),
    }
    assert all(c["meshes"] > 20 for c in found.values())
