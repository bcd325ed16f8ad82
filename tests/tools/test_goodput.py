"""What the tool counts is what happened."""

import importlib.util
import pathlib

import pytest

from imagegpt_jax.runtime import event_log
from imagegpt_jax.training import loop

_spec = importlib.util.spec_from_file_location("tiny_task", pathlib.Path(__file__).parents[1] / "tiny_task.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


@pytest.fixture
def goodput(load_tool):
    return load_tool("goodput.py")


def event(time, kind, **facts):
    return {"time": time, "event": kind, **facts}


def steps(time, step, seconds, data=0.0, save=0.0, evaluation=0.0):
    waits = {"data_wait_seconds": data, "checkpoint_seconds": save, "evaluation_seconds": evaluation}
    return event(time, "steps", step=step, seconds=seconds, **waits)


def test_all_time_is_accounted_for(goodput):
    shares = goodput.shares(
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
    assert sum(shares.values()) == pytest.approx(120.0)
    assert shares == pytest.approx(
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


def test_what_a_rollback_undoes_is_lost(goodput):
    shares = goodput.shares(
        [
            event(0.0, "start"),
            steps(10.0, 10, 10.0),
            steps(20.0, 20, 10.0),
            event(20.0, "rollback", to=10),
            steps(30.0, 20, 10.0),
        ]
    )
    assert (shares["steps"], shares["lost work"]) == (20.0, 10.0)


def test_what_saving_costs_is_the_time_it_held_the_steps_up(goodput):
    saves = [
        event(1.0, "save", bytes=50_000_000, blocking_seconds=seconds, background_seconds=9.0)
        for seconds in (0.1, 0.2, 0.6)
    ]
    assert goodput.saving([event(0.0, "start"), *saves], 90.0) == pytest.approx(
        {"saves": 3, "megabytes": 50.0, "blocking_seconds": 0.2, "seconds_between": 30.0, "share": 0.01}
    )
    assert goodput.saving([event(0.0, "start")], 90.0) == {"saves": 0}


def test_a_real_run_adds_up(goodput, tmp_path):
    loop.run(tiny.Task(), tiny.make_config(), tmp_path)
    events = event_log.read(tmp_path)
    seconds = goodput.shares(events)
    assert sum(seconds.values()) == pytest.approx(events[-1]["time"] - events[0]["time"], abs=0.05)
    assert seconds["steps"] > 0
    assert seconds["compile"] > 0
