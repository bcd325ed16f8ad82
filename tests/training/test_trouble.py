"""The loop in trouble: bad numbers, notices, damaged checkpoints, full disks; on a stage that compiles in a second."""

import errno
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import distributed, event_log, preemption
from imagegpt_jax.training import loop, step_guard, train_metrics

_spec = importlib.util.spec_from_file_location("tiny_task", pathlib.Path(__file__).parents[1] / "tiny_task.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


@pytest.fixture(autouse=True)
def notice(monkeypatch):
    """A notice of preemption of this test's own."""
    made = preemption.Notice()
    monkeypatch.setattr(preemption, "current", made)
    return made


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def lines(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def happened(workdir, *kinds):
    return [e for e in event_log.read(workdir) if e["event"] in kinds]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    return loop.run(tiny.Task(), tiny.make_config(), workdir), workdir


# ------------------------------------------------------------------------------------------------- numbers going wrong


def test_a_bad_step_is_left_out_counted_and_its_batch_kept(tmp_path):
    task = tiny.Task(bad=[21])
    state = loop.run(task, tiny.make_config(), tmp_path)
    written = lines(tmp_path)
    assert [line["train/skipped_steps"] for line in written if "train/skipped_steps" in line] == [0.0] * 5 + [1.0] * 7
    assert "train/loss" not in next(line for line in written if line["step"] == 6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.trainable))
    assert int(state.step) == 12
    (skip,) = happened(tmp_path, "skip")
    assert skip["steps"] == 1
    assert skip["newest"] == 5
    with np.load(tmp_path / "bad_batches" / "step-5.process-0.npz") as kept:
        assert kept["position"].tolist() == [20, 21, 22, 23]
        assert np.isnan(kept["y"]).tolist() == [False, True, False, False]


def test_a_step_that_is_left_out_changes_nothing_else(tmp_path):
    """The state after a bad batch is that of a run without it, but for the count of steps."""
    with_bad = loop.run(tiny.Task(bad=[9]), tiny.make_config(steps=6), tmp_path / "a")
    without = _Shorter()
    other = loop.run(without, tiny.make_config(steps=5), tmp_path / "b")
    assert_same((with_bad.trainable, with_bad.opt, with_bad.ema), (other.trainable, other.opt, other.ema))


class _Shorter(tiny.Task):
    """The data without the batch at position 8."""

    def batches(self, setup, split, *, batch_size, position=0, rows=None, skipped=()):
        return super().batches(setup, split, batch_size=batch_size, position=position, skipped=((8, 12),))


def test_bad_steps_in_a_row_roll_back_and_leave_the_window_out(tmp_path):
    task = tiny.Task(bad=range(20, 40))  # steps 6 to 10; that of 6 is saved, without its update
    state = loop.run(task, tiny.make_config(), tmp_path)
    # Three in a row trip the guard; the two that are left do not.
    (rollback,) = happened(tmp_path, "rollback")
    assert rollback["to"] == 6
    assert rollback["skipped_positions"] == [20, 32]
    assert int(state.step) == 12
    assert checkpoint.Checkpoints(tmp_path, tiny.make_config()).restore(state)[1].skipped == ((20, 32),)
    assert task.drawn[-6:] == [32, 36, 40, 44, 48, 52]
    written = [line["step"] for line in lines(tmp_path)]
    assert sorted(written) == written

    again = loop.run(tiny.Task(bad=range(20, 40)), tiny.make_config(log_every=1), tmp_path / "again")
    assert_same(state, again)


def test_when_it_is_noticed_makes_no_difference(tmp_path):
    bad = range(20, 40)
    often = loop.run(tiny.Task(bad=bad), tiny.make_config(), tmp_path / "a")
    seldom = loop.run(tiny.Task(bad=bad), tiny.make_config(log_every=6), tmp_path / "b")
    assert_same(often, seldom)


def test_a_rollback_without_a_checkpoint_begins_anew(tmp_path):
    config = tiny.make_config(**{"checkpoint.every": 0})
    state = loop.run(tiny.Task(bad=range(0, 12)), config, tmp_path)
    assert happened(tmp_path, "rollback")[0]["to"] == 0
    assert int(state.step) == 12


def test_a_rollback_to_the_start_begins_with_the_same_run_again(tmp_path):
    """A run with bad data goes on as one that began with the same parameters, and without these data."""
    loop.run(tiny.Task(), tiny.make_config(), tmp_path / "first")
    config = {"init_from": str(tmp_path / "first"), "checkpoint.every": 0, "steps": 6}
    with_bad = loop.run(tiny.Task(bad=range(8, 20)), tiny.make_config(**config, seed=1), tmp_path / "a")
    assert happened(tmp_path / "a", "rollback")[0]["skipped_positions"] == [8, 20]
    without = loop.run(_Later(), tiny.make_config(**config, seed=1), tmp_path / "b")
    assert_same(with_bad.trainable, without.trainable)


class _Later(tiny.Task):
    """The data without the batches at positions 8 to 19."""

    def batches(self, setup, split, *, batch_size, position=0, rows=None, skipped=()):
        return super().batches(setup, split, batch_size=batch_size, position=position, skipped=((8, 20),))


def test_rollouts_are_kept_where_a_step_was_bad_and_come_again_after_a_rollback(tmp_path):
    """Three bad steps from position 20 on: back to the checkpoint of step 4, and on with the state from there."""
    given = []

    def rollout(setup, state, position):
        slope = np.asarray(state.trainable["line"]["slope"])
        x = np.random.default_rng(position).normal(size=(4, 3)).astype(np.float32)
        y = x.sum(1) + np.sign(x @ slope) + (np.nan if 20 <= position < 32 else 0)
        given.append((position, x, slope))
        return {"x": x, "y": y.astype(np.float32)}

    state = loop.run(tiny.Task(rollout=rollout), tiny.make_config(**{"checkpoint.every": 4}), tmp_path)
    (rollback,) = happened(tmp_path, "rollback")
    assert rollback["skipped_positions"] == [20, 32]
    positions = [position for position, *_ in given]
    assert positions[-8:] == [16, *range(32, 60, 4)]
    assert int(state.step) == 12
    first, again = (slope for position, _, slope in given if position == 16)
    np.testing.assert_array_equal(first, again)
    kept = np.load(tmp_path / "bad_batches" / "step-5.process-0.npz")
    np.testing.assert_array_equal(kept["x"], next(x for position, x, _ in given if position == 20))
    assert np.isnan(kept["y"]).all()


def test_what_is_not_in_the_data_ends_after_some_rollbacks(tmp_path):
    with pytest.raises(UserError, match=r"after 2 rollbacks, last at step \d+.*replay"):
        loop.run(tiny.Task(bad=range(0, 4000)), tiny.make_config(), tmp_path)
    assert len(happened(tmp_path, "rollback")) == 3
    assert "rollbacks" in happened(tmp_path, "exit")[-1]["why"]


def judge(losses, **config):
    settings = tiny.make_config(**{f"guard.{k}": v for k, v in config.items()}).guard
    state, verdicts = train_state.init_guard(["a"])["a"], []
    for step, loss in enumerate(losses):
        good, state = step_guard.judge(
            settings, state, jnp.asarray(step), {"loss": train_metrics.mean(jnp.asarray(loss))}
        )
        verdicts.append(bool(good))
    return verdicts, state


def test_a_leap_of_the_loss_is_left_out():
    losses = [*np.random.default_rng(0).normal(2.0, 0.1, 50), 2.2, 9.0, 2.1]
    assert judge(losses, spike=6.0, window=20)[0] == [*[True] * 51, False, True]
    assert all(judge(losses, spike=0.0, window=20)[0])
    assert all(judge(losses[-10:], spike=6.0, window=20)[0])  # too early to say


def test_the_running_mean_is_a_mean_first():
    values = np.random.default_rng(1).normal(3.0, 2.0, 40)
    _, state = judge(values, window=100)
    np.testing.assert_allclose(state["mean"], values.mean(), rtol=1e-5)
    np.testing.assert_allclose(state["variance"], values.var(), rtol=1e-4)
    _, state = judge([*values, float("nan"), float("inf")], window=100)
    np.testing.assert_allclose(state["mean"], values.mean(), rtol=1e-5)
    assert (int(state["skipped"]), int(state["in_a_row"]), int(state["first"])) == (2, 2, 40)


# -------------------------------------------------------------------------------------------------------- notices


def test_a_notice_saves_and_the_same_command_goes_on_to_the_same_bits(undisturbed, tmp_path, notice, monkeypatch):
    expected, reference = undisturbed

    def hook(drawn):
        if drawn == 7:
            notice._signalled = True

    stopped = loop.run(tiny.Task(hook=hook), tiny.make_config(), tmp_path)
    assert int(stopped.step) == 7
    assert notice.given
    assert [e["step"] for e in happened(tmp_path, "preempted")] == [7]
    assert happened(tmp_path, "exit")[-1]["why"] == "preempted"
    monkeypatch.setattr(preemption, "current", preemption.Notice())
    assert_same(loop.run(tiny.Task(), tiny.make_config(), tmp_path), expected)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


def test_a_notice_within_an_evaluation_has_it_done_again(undisturbed, tmp_path, notice, monkeypatch):
    expected, reference = undisturbed

    def hook(drawn):
        if drawn == -8:
            notice._signalled = True

    stopped = tiny.Task(hook=hook)
    assert int(loop.run(stopped, tiny.make_config(), tmp_path).step) == 8
    assert stopped.evaluations == [4]
    monkeypatch.setattr(preemption, "current", preemption.Notice())
    resumed = tiny.Task()
    assert_same(loop.run(resumed, tiny.make_config(), tmp_path), expected)
    assert resumed.evaluations == [8, 12]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------- damaged files


def flip(workdir, step):
    file = max((workdir / "checkpoints" / str(step) / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(bytes(data))


def cut_off(folder, committed):
    """Makes of a checkpoint what a kill leaves between the end of Orbax's part, or before it, and the manifest."""
    (folder / "manifest.json").unlink()
    (folder / "manifest.json.tmp").write_text("")
    if not committed:
        (folder / "state").rename(folder / "state.orbax-checkpoint-tmp")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_counts(undisturbed, tmp_path, capsys):
    expected, _ = undisturbed
    loop.run(tiny.Task(), tiny.make_config(steps=12), tmp_path)
    for step in (12, 10):
        flip(tmp_path, step)
    task = tiny.Task()
    assert_same(loop.run(task, tiny.make_config(), tmp_path), expected)
    assert task.drawn[0] == 8 * 4
    assert [e["step"] for e in happened(tmp_path, "damaged")] == [12, 10]
    assert "the checkpoint of step 12 is damaged and set aside" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "damaged").iterdir()) == ["10", "12"]


def test_nothing_but_damaged_checkpoints_ends_with_a_sentence(tmp_path):
    loop.run(tiny.Task(), tiny.make_config(steps=4), tmp_path)
    for step in (2, 4):
        flip(tmp_path, step)
    with pytest.raises(UserError, match="none of the checkpoints in .* is as it was written"):
        loop.run(tiny.Task(), tiny.make_config(steps=4), tmp_path)


@pytest.mark.parametrize("committed", [False, True])
def test_a_save_that_was_cut_off_is_no_checkpoint(undisturbed, tmp_path, committed):
    expected, _ = undisturbed
    loop.run(tiny.Task(), tiny.make_config(), tmp_path)
    cut_off(tmp_path / "checkpoints" / "12", committed)
    assert_same(loop.run(tiny.Task(), tiny.make_config(), tmp_path), expected)
    assert not happened(tmp_path, "damaged")


def test_a_first_save_that_was_cut_off_before_its_manifest_leaves_a_run_that_begins_anew(tmp_path, capsys):
    config = tiny.make_config(steps=2)
    expected = loop.run(tiny.Task(), config, tmp_path)
    cut_off(tmp_path / "checkpoints" / "2", committed=True)
    task = tiny.Task()
    assert_same(loop.run(task, config, tmp_path), expected)
    assert task.drawn[0] == 0
    assert not happened(tmp_path, "damaged")

    # A manifest that was there and is gone is another matter.
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of the checkpoints in .* is as it was written"):
        loop.run(tiny.Task(), config, tmp_path)


def test_a_failed_save_ends_the_run_with_its_cause(tmp_path, monkeypatch):
    original = ocp.AsyncCheckpointer.save

    def save(self, directory, *args, **kwargs):
        if directory.parent.name == "6":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", save)
    with pytest.raises(UserError, match="step 6 could not be written .*No space left on device.*make room"):
        loop.run(tiny.Task(), tiny.make_config(), tmp_path)
    assert happened(tmp_path, "save_failed")[0]["step"] == 6
    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", original)
    task = tiny.Task()
    loop.run(task, tiny.make_config(), tmp_path)
    assert task.drawn[0] == 4 * 4


def test_a_save_that_fails_in_the_background_is_not_swallowed(tmp_path, monkeypatch):
    """The last save of a run: nothing comes after it that would notice."""

    def wait(self):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", wait)
    with pytest.raises(UserError, match="step 4 could not be written .*Read-only file system"):
        loop.run(tiny.Task(), tiny.make_config(steps=4, **{"checkpoint.every": 0}), tmp_path)


def test_a_last_checkpoint_that_reads_back_differently_is_an_error(tmp_path, monkeypatch):
    original = checkpoint.Checkpoints.wait

    def wait(self):
        original(self)
        if (tmp_path / "checkpoints" / "4" / "manifest.json").exists():
            flip(tmp_path, 4)

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", wait)
    with pytest.raises(UserError, match="cannot be read back"):
        loop.run(tiny.Task(), tiny.make_config(steps=4, **{"checkpoint.every": 0}), tmp_path)


# ----------------------------------------------------------------------------------------- what a workdir holds


def test_events_tell_the_story(undisturbed):
    _, workdir = undisturbed
    story = [e["event"] for e in event_log.read(workdir) if e["event"] not in ("steps", "save", "evaluation")]
    assert story == ["start", "compile", "verify", "exit"]
    assert [e["step"] for e in happened(workdir, "save")] == [2, 4, 6, 8, 10, 12]
    assert all(e["blocking_seconds"] >= 0 and e["bytes"] > 0 for e in happened(workdir, "save"))


def test_alone_everybody_is_heard():
    assert distributed.gather({"a": 1}) == [{"a": 1}]


def test_torn_files_of_a_workdir_do_not_keep_it_from_going_on(undisturbed, tmp_path):
    expected, reference = undisturbed
    loop.run(tiny.Task(), tiny.make_config(steps=12), tmp_path)
    for step in (10, 12):
        (tmp_path / "checkpoints" / str(step) / "manifest.json").unlink()
    for name in ("metrics.jsonl", "timing.jsonl", "events.jsonl", "quarantine.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'[1]\n\xff\xfe\x00{"step": 1')
    assert_same(loop.run(tiny.Task(), tiny.make_config(), tmp_path), expected)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    assert happened(tmp_path, "exit")[-1]["why"] == "finished"


def test_a_file_where_the_checkpoints_should_be_is_one_sentence(tmp_path):
    loop.run(tiny.Task(), tiny.make_config(steps=2), tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints is a file"):
        loop.run(tiny.Task(), tiny.make_config(steps=2), tmp_path)
