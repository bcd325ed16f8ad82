"""The watchdog by itself, by a clock that the test moves: who is missing is found out, and reported in one sentence."""

import json
import threading
import time
import types

import pytest

from imagegpt_jax.runtime import cluster, distributed, event_log, exit_report, watchdog
from imagegpt_jax.runtime import group as group_lib

SILENCE, STALL = 40, 3600


class Signs:
    """A coordinator's store, in which the other processes leave their signs when the test says so."""

    def __init__(self):
        self.held, self.broken = {}, None

    def put(self, text):
        if self.broken:
            raise self.broken
        self.held[0] = text

    def all(self):
        return dict(self.held)


@pytest.fixture
def clock(monkeypatch):
    """Time that the test moves; the threads poll all the while."""
    made = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(watchdog, "_POLL_SECONDS", 0.002)
    monkeypatch.delenv("IMAGEGPT_JAX_HEARTBEAT_SECONDS", raising=False)
    monkeypatch.delenv("IMAGEGPT_JAX_STALL_SECONDS", raising=False)
    return made


class Watch:
    """A watchdog with its store, and the sentences with which it would end."""

    def __init__(self, clock, count=3, signs=True):
        self.clock, self.store, self.said = clock, Signs() if signs else None, []
        self.dog = watchdog.Watchdog(self.said.append, self.store, count)

    def advance(self, seconds, by=1.0, **alive):
        """Moves the clock in steps that both threads see, in each of which the `alive` leave a sign: pN=their step."""
        for _ in range(round(seconds / by)):
            self.clock.now += by
            for name, step in alive.items():
                self.store.held[int(name[1:])] = json.dumps([self.clock.now, step])
            until = time.monotonic() + 20
            while not self.said and time.monotonic() < until and not self._has_seen():
                time.sleep(0.001)
            if self.said:
                return

    def _has_seen(self):
        asked = self.store is None or self.store.broken or self.dog._answered == self.clock.now
        return asked and self.dog._ticked == self.clock.now


@pytest.fixture
def watch(clock):
    """Makes a `Watch`."""
    made = []

    def make(**settings):
        made.append(Watch(clock, **settings))
        return made[-1]

    yield make
    for one in made:
        one.dog.stop()


def test_while_all_give_signs_nothing_happens(watch):
    run = watch()
    run.advance(3 * SILENCE, p1=0, p2=0)
    assert run.said == []


@pytest.mark.parametrize("missing", [1, 2])
def test_the_process_that_stops_giving_signs_is_named(missing, watch):
    run = watch()
    run.advance(5, p1=0, p2=0)
    run.advance(SILENCE + 5, **{f"p{3 - missing}": 0})
    assert run.said == [f"process {missing} has not answered for {SILENCE + 1} s"]


def test_a_process_that_never_gave_a_sign_is_named(watch):
    run = watch()
    run.advance(SILENCE + 5, p1=0)
    assert run.said == [f"process 2 has not answered for {SILENCE + 1} s"]


def test_a_coordinator_that_does_not_answer_is_named_with_what_it_said(watch):
    run = watch()
    run.advance(3, p1=0, p2=0)
    run.store.broken = RuntimeError("UNAVAILABLE: failed to connect\nmore")
    run.advance(SILENCE + 5)
    (said,) = run.said
    assert said.startswith("process 0 has not answered for 4")
    assert said.endswith(" s (UNAVAILABLE: failed to connect)")


def test_a_coordinator_that_answers_again_in_time_is_forgiven(watch):
    run = watch(count=1)
    run.store.broken = RuntimeError("UNAVAILABLE")
    run.advance(SILENCE - 5)
    run.store.broken = None
    run.advance(SILENCE)
    assert run.said == []


def test_a_run_without_a_step_names_the_slowest(watch):
    run = watch()
    run.dog.progress(12)
    run.advance(STALL + 60, by=30.0, p1=11, p2=12)
    assert run.said == [f"no step for {STALL + 30} s (at step 11: process 1)"]


def test_a_process_alone_is_told_of_its_own_step(watch):
    run = watch(signs=False)
    run.dog.progress(3)
    run.advance(STALL, by=30.0)
    assert run.said == []
    run.advance(60, by=30.0)
    assert run.said == [f"no step for {STALL + 30} s (at step 3: process 0)"]


def test_every_step_begins_the_count_anew(watch):
    run = watch(signs=False)
    for step in range(3):
        run.dog.progress(step)
        run.advance(STALL - 60, by=30.0)
    assert run.said == []


def test_a_process_that_was_stopped_itself_blames_nobody(watch):
    run = watch()
    run.advance(2, p1=0, p2=0)
    run.advance(500, by=500.0)  # what a SIGSTOP looks like from within
    assert run.said == ["this process was itself stopped for 500 s"]


def test_when_stopped_it_says_nothing_more(watch, clock):
    run = watch()
    run.advance(2, p1=0, p2=0)
    run.dog.stop()
    clock.now += 10 * SILENCE
    time.sleep(0.05)
    assert run.said == []


def test_the_settings_are_seconds(monkeypatch):
    monkeypatch.setenv("IMAGEGPT_JAX_HEARTBEAT_SECONDS", "8")
    assert watchdog.silence_seconds() == 8
    monkeypatch.delenv("IMAGEGPT_JAX_HEARTBEAT_SECONDS")
    assert watchdog.silence_seconds() + 20 <= 60  # a hang ends within a minute


def test_the_stacks_of_all_threads_are_written(tmp_path):
    waiting, go_on = threading.Event(), threading.Event()

    def stuck_in_a_collective():
        waiting.set()
        go_on.wait()

    thread = threading.Thread(target=stuck_in_a_collective)
    thread.start()
    waiting.wait()
    try:
        path = watchdog.write_stacks(str(tmp_path), "process-3")
    finally:
        go_on.set()
        thread.join()
    assert path == str(tmp_path / "stacks" / "process-3.txt")
    text = (tmp_path / "stacks" / "process-3.txt").read_text()
    assert "stuck_in_a_collective" in text
    assert "test_the_stacks_of_all_threads_are_written" in text


def test_a_folder_that_cannot_be_written_does_not_keep_it_from_ending(tmp_path):
    (tmp_path / "stacks").touch()
    assert watchdog.write_stacks(str(tmp_path), "process-0") == ""


def test_a_hang_is_reported_in_one_sentence_in_the_folder_and_in_the_status(tmp_path, monkeypatch, capfd):
    class Ended(Exception):
        pass

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(distributed.os, "_exit", leave)
    monkeypatch.setattr(exit_report, "_spoken", threading.Lock())
    group = object.__new__(group_lib.Group)
    told = []
    group.cluster, group.name = cluster.Cluster("h:1", 2, 0), "process 0 of 2 on host"
    group.client = types.SimpleNamespace(key_value_set=lambda key, value: told.append(json.loads(value)))
    with exit_report.kept_in(tmp_path, event_log.Log(tmp_path)), pytest.raises(Ended, match="76"):
        group._hangs("process 1 has not answered for 41 s")
    (line,) = capfd.readouterr().err.splitlines()
    stacks = tmp_path / "stacks" / "process-0.txt"
    assert line == (
        f"error: process 0 of 2 on host ends, because process 1 has not answered for 41 s; what it did: {stacks}."
    )
    assert "test_a_hang_is_reported" in stacks.read_text()
    assert told == ["process 0 of 2 on host: process 1 has not answered for 41 s"]
    (event,) = event_log.read(tmp_path)
    assert (event["event"], event["reason"], event["process"]) == ("hang", "process 1 has not answered for 41 s", 0)


def test_a_folder_that_hangs_itself_does_not_keep_a_process_from_ending(tmp_path, monkeypatch, capfd):
    never = threading.Event()
    monkeypatch.setattr(exit_report, "_spoken", threading.Lock())
    monkeypatch.setattr(exit_report, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(exit_report, "write_stacks", lambda *args: never.wait())
    log = types.SimpleNamespace(write=lambda *args, **facts: never.wait())
    with exit_report.kept_in(tmp_path, log):
        exit_report.hang("the training", 0, "no step for 3601 s (at step 3: process 0)")
    never.set()
    assert capfd.readouterr().err == "error: the training ends, because no step for 3601 s (at step 3: process 0).\n"


def test_only_the_first_sentence_is_said(monkeypatch, capfd):
    monkeypatch.setattr(exit_report, "_spoken", threading.Lock())
    exit_report.say("the cause")
    exit_report.say("a consequence")
    assert capfd.readouterr().err == "error: the cause\n"
