"""The loop over both tasks at `size=test`: deterministic, resumable to the same bits, compiled once, one sync a log."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from imagegpt_jax import config as config_lib
from imagegpt_jax.tasks import decoder, tokenizer
from imagegpt_jax.training import loop, optimizers, train_metrics

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
TASKS = {"tokenizer": tokenizer.TASK, "decoder": decoder.TASK}

_spec = importlib.util.spec_from_file_location("tiny_task", pathlib.Path(__file__).parents[1] / "tiny_task.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def make_config(task, **changes):
    config = config_lib.sibling(str(CONFIGS / "x.py"), f"{task}.py").get_config("size=test")
    config.eval_every = 0
    config.log_every = 1
    for key, value in changes.items():
        config[key] = value
    return config


@pytest.fixture(scope="module", params=TASKS)
def finished(request, tmp_path_factory):
    """A run of a task to its end."""
    workdir = tmp_path_factory.mktemp(request.param)
    compiled = []
    original = loop.Steps.__init__

    def spy(self, *args):
        original(self, *args)
        compiled.append(self.compiled)

    fetches = []
    fetch = train_metrics.fetch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Steps, "__init__", spy)
        patch.setattr(train_metrics, "fetch", lambda totals: fetches.append(1) or fetch(totals))
        state = loop.run(TASKS[request.param], make_config(request.param), workdir)
    return request.param, workdir, state, compiled[0], len(fetches)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_step_is_compiled_once_for_each_phase(finished):
    task, _, _, compiled, _ = finished
    assert set(compiled) == ({"reconstruction", "adversarial"} if task == "tokenizer" else {"train"})
    for step in compiled.values():
        assert step._cache_size() == 1


def test_one_host_sync_for_each_logged_interval(finished):
    task, workdir, _, _, fetches = finished
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert fetches == sum("train/gradient_norm" in line for line in lines) == make_config(task).steps


def test_learning_rates_are_logged_of_every_optimizer_since_its_first_update(finished):
    task, workdir, _, _, _ = finished
    config = make_config(task)
    rate = optimizers.schedule(config.optim, config.steps)
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    for name, before in (("learning_rate", 0), ("discriminator_learning_rate", 4)):
        logged = {line["step"]: line[f"train/{name}"] for line in lines if f"train/{name}" in line}
        assert list(logged) == (list(range(before + 1, 9)) if task == "tokenizer" or not before else [])
        for step, value in logged.items():
            assert value == pytest.approx(float(rate(step - before - 1)), rel=1e-6)


def test_checkpoints_are_kept(finished):
    _, workdir, _, _, _ = finished
    assert len([p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]) >= 4


@pytest.fixture
def compiled_anew():
    """Programs are compiled for this test, not read from what earlier ones have compiled."""

    def read_earlier_ones(enable):
        jax.config.update("jax_enable_compilation_cache", enable)
        compilation_cache.reset_cache()

    read_earlier_ones(False)
    yield
    read_earlier_ones(True)


def test_the_same_command_gives_the_same_bits(finished, compiled_anew, tmp_path):
    task, workdir, state, _, _ = finished
    again = loop.run(TASKS[task], make_config(task), tmp_path / "again")
    assert_same(state, again)
    assert (workdir / "metrics.jsonl").read_bytes() == (tmp_path / "again" / "metrics.jsonl").read_bytes()


def test_a_run_cut_short_continues_to_the_same_bits(finished, compiled_anew, tmp_path, monkeypatch):
    task, workdir, state, _, _ = finished

    class Cut(Exception):
        pass

    original = loop.Steps.__call__
    calls = []

    def cut(self, *args):
        calls.append(1)
        if len(calls) == 6:  # the newest checkpoint is of step 4
            raise Cut
        return original(self, *args)

    monkeypatch.setattr(loop.Steps, "__call__", cut)
    with pytest.raises(Cut):
        loop.run(TASKS[task], make_config(task), tmp_path / "cut")
    monkeypatch.setattr(loop.Steps, "__call__", original)
    continued = loop.run(TASKS[task], make_config(task), tmp_path / "cut")
    assert_same(state, continued)
    assert (workdir / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()


def test_another_seed_gives_other_bits(finished, tmp_path):
    task, _, state, _, _ = finished
    other = loop.run(TASKS[task], make_config(task, seed=1, steps=2), tmp_path / "other")
    assert not np.array_equal(jax.tree.leaves(state.trainable)[0], jax.tree.leaves(other.trainable)[0])


@pytest.mark.parametrize(("every", "counted"), [(1, [1] * 12), (2, [2] * 6), (5, [5, 5, 2])])
def test_throughput_is_of_the_steps_of_its_interval(every, counted, tmp_path, monkeypatch):
    """Also where evaluations have an interval read before the next step, and at the end."""
    read, steps = train_metrics.Throughput.read, []
    monkeypatch.setattr(
        train_metrics.Throughput, "read", lambda self: steps.append(self._done["examples"] / 4) or read(self)
    )
    loop.run(tiny.Task(), tiny.make_config(log_every=every, eval_every=4), tmp_path)
    assert steps == counted
