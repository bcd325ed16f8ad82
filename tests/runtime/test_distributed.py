"""Many processes: real ones on this machine, started by launch/local.sh. They train as one, and fail as one."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import distributed, filesystem
from imagegpt_jax.runtime import group as group_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = "--config.data.validation=emoji:validation,res=16,styles=noto"
TOKENIZER = ("--config=configs/tokenizer.py:size=test", "--config.loss.gan_start=-1", DATA)
DECODER = ("--config=configs/decoder.py:size=test", "--config.eval_every=0", "--config.mesh.fsdp=2", DATA)


def environment(**more):
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "OMPI_"))}
    return alone | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"} | more


def start(*arguments, **more):
    """Two processes of two devices each."""
    return subprocess.Popen(
        ["bash", "launch/local.sh", "--processes=2", "--devices=2", "--", *arguments],
        cwd=ROOT,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs the tests in the background may have it ignored, which a shell cannot change.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def end(launched, timeout=150):
    output, error = launched.communicate(timeout=timeout)
    return launched.returncode, output, error


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def processes_of(workdir):
    """Number -> id of the processes of a run, by what /proc says of their commands and environments."""
    results = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = {f"--workdir={workdir}".encode(), b"imagegpt_jax.train"} <= set(command) and b"bash" not in command
        number = next((int(v[15:]) for v in variables if v.startswith(b"JAX_PROCESS_ID=")), None)
        if wanted and number is not None:
            results[number] = int(folder.name)
    return results


def stand_in(tmp_path, body):
    """An interpreter that is Python, after what `body` does in each process."""
    path = tmp_path / "python"
    path.write_text(f'#!/usr/bin/env bash\n{body}\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return str(path)


# ---------------------------------------------------------------------------------------------------------- real runs


def test_a_tokenizer_trains_in_two_processes_and_the_first_speaks_for_both(tmp_path):
    workdir = tmp_path / "run"
    status, output, error = end(start(*TOKENIZER, "--config.steps=4", f"--workdir={workdir}"))
    assert status == 0, error
    assert error.rstrip().endswith(f"Finished 4 steps: {workdir}")
    assert "[1]" not in output + error
    assert [line["step"] for line in lines(workdir)] == [2, 4, 4]
    assert "validation/psnr" in lines(workdir)[-1]
    assert len(list(workdir.glob("events.out.*"))) == 1
    state = workdir / "checkpoints" / "4" / "state"
    assert sorted(p.name for p in state.glob("ocdbt.process_*")) == ["ocdbt.process_0", "ocdbt.process_1"]


def test_a_decoder_whose_process_is_killed_ends_and_continues(tmp_path):
    workdir = tmp_path / "run"
    arguments = (*DECODER, "--config.steps=24", f"--workdir={workdir}")
    launched = start(*arguments, "--config.checkpoint.every=2", IMAGEGPT_JAX_HEARTBEAT_SECONDS="10")
    until = time.monotonic() + 120
    while not (workdir / "checkpoints" / "2" / "manifest.json").exists():
        assert launched.poll() is None, end(launched)
        assert time.monotonic() < until
        time.sleep(0.1)
    os.kill(processes_of(workdir)[1], signal.SIGKILL)
    killed = time.monotonic()
    status, _, error = end(launched, timeout=60)
    assert time.monotonic() - killed < 10 + 15
    assert status == 128 + signal.SIGKILL
    assert "error: process 1 ended by signal 9." in error
    # Process 0 says so where a collective fails, or its watchdog where that waits for ever.
    assert re.search(r"process 0 of 2 on .* (lost another process|ends, because process 1 has not answered)", error)
    before = [line["step"] for line in lines(workdir)]
    assert before[0] == 2
    assert before[-1] < 24

    status, _, error = end(start(*arguments, "--config.checkpoint.every=0"))
    assert status == 0, error
    written = lines(workdir)
    assert [line["step"] for line in written] == [*range(2, 26, 2), 24]
    assert "validation/image_bits_per_token" in written[-1]


def wait_for(condition, launched, seconds=150):
    until = time.monotonic() + seconds
    while not condition():
        assert launched.poll() is None, end(launched)
        assert time.monotonic() < until
        time.sleep(0.1)


def test_notice_to_one_process_saves_in_all_after_the_same_step(tmp_path):
    workdir = tmp_path / "run"
    launched = start(*DECODER, "--config.steps=100000", "--config.checkpoint.every=0", f"--workdir={workdir}")
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and len(lines(workdir)) > 2, launched)
    os.kill(processes_of(workdir)[1], signal.SIGTERM)
    noticed = time.monotonic()
    status, _, error = end(launched, timeout=60)
    assert status == 75, error
    assert time.monotonic() - noticed < 30
    assert re.search(r"Stopped after step (\d+) of 100000, saved; the same command goes on", error)
    (step,) = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    manifest = json.loads((workdir / "checkpoints" / str(step) / "manifest.json").read_text())
    assert manifest["position"] == step * 8
    last = [json.loads(x) for x in (workdir / "events.jsonl").read_text().splitlines()][-1]
    assert (last["event"], last["why"], last["step"]) == ("exit", "preempted", step)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_stops_answering_ends_the_run_and_is_named(stopped, tmp_path):
    workdir = tmp_path / "run"
    settings = ("--config.steps=100000", "--config.checkpoint.every=0", f"--workdir={workdir}")
    launched = start(*DECODER, *settings, IMAGEGPT_JAX_HEARTBEAT_SECONDS="8")
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and len(lines(workdir)) > 2, launched)
    os.kill(processes_of(workdir)[stopped], signal.SIGSTOP)
    status, _, error = end(launched, timeout=8 + 20 + 20)  # the launcher's patience with the one that is stopped
    assert status == 76, error
    assert re.search(rf"process {1 - stopped} of 2 on .* ends, because process {stopped} has not answered for", error)
    stacks = (workdir / "stacks" / f"process-{1 - stopped}.txt").read_text()
    assert "_train" in stacks


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("--config.data.train=folder:/no/such/folder", "there is no folder /no/such/folder"),
        ("--config.seed=5", "another config than process 0"),
    ],
)
def test_what_is_wrong_with_one_process_ends_all_and_writes_nothing(extra, words, tmp_path):
    python = stand_in(tmp_path, f'[ "${{JAX_PROCESS_ID:-0}}" = 0 ] || set -- "$@" {extra}')
    launched = start(*TOKENIZER, f"--workdir={tmp_path / 'run'}", PYTHON=python)
    status, output, error = end(launched, timeout=60)
    assert status == 1
    host = socket.gethostname()
    last = [line for line in (output + error).splitlines() if "error: " in line]
    assert f"[1] error: process 1 of 2 on {host}: " in error
    assert f"error: process 0 of 2 on {host} ends, because of process 1 of 2 on {host}: " in error
    assert len(last) == 2
    assert all(words in line for line in last)
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_a_signal_to_the_launcher_ends_all(how, tmp_path):
    workdir = tmp_path / "run"
    python = stand_in(tmp_path, f'[ -z "${{JAX_PROCESS_ID:-}}" ] || touch "{tmp_path}/started.$JAX_PROCESS_ID"')
    launched = start(*TOKENIZER, f"--workdir={workdir}", PYTHON=python)
    while len(list(tmp_path.glob("started.*"))) < 2:
        time.sleep(0.05)
    wait_for(lambda: len(processes_of(workdir)) == 2, launched)
    pids = processes_of(workdir).values()
    if how == "SIGTERM":
        launched.send_signal(signal.SIGTERM)
    else:  # the terminal sends it to all
        os.killpg(launched.pid, signal.SIGINT)
    status, _, _ = end(launched, timeout=40)
    assert status == 130
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)


def alone(*arguments, module="train", **more):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"imagegpt_jax.{module}", *arguments],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, time.monotonic() - started


@pytest.mark.parametrize("index", [0, 1])
def test_others_that_do_not_come_are_not_waited_for_for_ever(index, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done, _ = alone(
        *TOKENIZER,
        f"--workdir={tmp_path / 'run'}",
        JAX_COORDINATOR_ADDRESS=address,
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID=str(index),
        IMAGEGPT_JAX_START_SECONDS="2",
    )
    assert done.returncode == 1
    (last,) = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert address in last
    assert "within 2 s" in last
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- buckets


def test_a_bucket_that_cannot_be_reached_is_told_within_ten_seconds(tmp_path):
    # A proxy that answers no one stands for a network that swallows everything; the tests must not ask the real one.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for _ in range(3):  # the time is the program's: a machine that is busy with other tests gets another try
            started = time.monotonic()
            subprocess.run([sys.executable, "-c", "import tensorflow"], check=True, capture_output=True)
            importing = time.monotonic() - started
            done, seconds = alone(*TOKENIZER, "--workdir=gs://no-such-bucket/x", https_proxy=proxy, http_proxy=proxy)
            if seconds < (limit := max(10, 5 + importing)):  # slow processors take over five seconds to import it
                break
    assert done.returncode == 1
    (last,) = done.stderr.splitlines()
    assert last.startswith("error: gs://no-such-bucket/x did not answer")
    assert all(word in last for word in ("bucket's name", "network", "credentials"))
    assert seconds < limit


def test_a_bucket_that_is_refused_is_told_with_the_reason(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{free.getsockname()[1]}"
    data = "--config.data.train=folder:gs://no-such-bucket/x"
    done, _ = alone(*TOKENIZER, data, f"--workdir={tmp_path / 'run'}", https_proxy=proxy, http_proxy=proxy)
    assert done.returncode == 1
    (last,) = done.stderr.splitlines()
    assert last.startswith("error: gs://no-such-bucket/x ")
    assert "credentials" in last
    assert not (tmp_path / "run").exists()


CHECKED = {
    "TFDS's folder": ("train", *TOKENIZER, "--workdir=/no/such/folder/run"),
    "a decoder": ("sample", "--decoder=gs://no-such-bucket/x", "--prompt=cat", "--output=/no/such/folder/o"),
    "pictures trained on": ("evaluate", "--images=i", "--train_images=gs://no-such-bucket/x", "--output=o.json"),
    "checkpoints": ("checkpoint", "ls", "gs://no-such-bucket/x"),
}


@pytest.mark.parametrize("what", CHECKED)
def test_whatever_a_program_is_told_is_checked_before_it_works(what):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{free.getsockname()[1]}"
    module, *arguments = CHECKED[what]
    more = {"TFDS_DATA_DIR": "gs://no-such-bucket/x"} if what.startswith("TFDS") else {}
    done, _ = alone(*arguments, module=module, https_proxy=proxy, http_proxy=proxy, **more)
    assert done.returncode == 1
    (last,) = done.stderr.splitlines()
    assert last.startswith("error: gs://no-such-bucket/x ")
    assert "check the bucket's name" in last


def test_a_process_that_fails_before_it_has_joined_tells_the_others(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Only process 1 is sent to where nobody answers.
    proxy = f"https_proxy=http://127.0.0.1:{port} no_proxy=127.0.0.1"
    body = f'[ "${{JAX_PROCESS_ID:-0}}" = 0 ] || export {proxy} TFDS_DATA_DIR=gs://none/x'
    started = time.monotonic()
    launched = start(*TOKENIZER, f"--workdir={tmp_path / 'run'}", PYTHON=stand_in(tmp_path, body))
    status, _, error = end(launched, timeout=60)
    said = [line for line in error.splitlines() if "error: " in line]
    assert status == 1
    assert len(said) == 2
    assert any(line.startswith("[1] error: gs://none/x ") for line in said)
    host = socket.gethostname()
    assert any(
        line.startswith(f"error: process 0 of 2 on {host} ends, because of process 1 of 2 on {host}: gs://none/x ")
        for line in said
    )
    assert time.monotonic() - started < 20  # the launcher's patience with those that do not end
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["HEARTBEAT", "STALL"])
def test_settings_that_are_no_numbers_are_told_before_anything_is_written(name, tmp_path):
    variable = f"IMAGEGPT_JAX_{name}_SECONDS"
    done, _ = alone(*TOKENIZER, f"--workdir={tmp_path / 'run'}", **{variable: "abc"})
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: {variable}='abc' is not a number."]
    assert not (tmp_path / "run").exists()


def test_a_file_of_ones_own_is_no_lost_process(monkeypatch):
    monkeypatch.setattr(distributed, "_group", object())
    assert distributed.is_loss_of_peer(RuntimeError("[Gloo] Connection closed by peer"))
    assert not distributed.is_loss_of_peer(RuntimeError("no igloo here"))
    assert not distributed.is_loss_of_peer(FileNotFoundError(2, "No such file or directory", "/data/gloo/a.png"))
    assert not distributed.is_loss_of_peer(ConnectionResetError(104, "Connection reset by peer"))


def test_a_signal_after_the_end_does_not_change_the_status(monkeypatch):
    group = types.SimpleNamespace(barrier=lambda: None, stop_watching=lambda: None)
    monkeypatch.setattr("jax.distributed.shutdown", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        group_lib.Group.end(group)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_buckets_are_found_in_flags_and_configs():
    config = {"data": {"train": "0.7*folder:gs://a/x + array_record:gs://b/y,split=train"}, "list": ["gs://a/z", 3]}
    assert filesystem.paths("gs://c/run", "/local", config) == ["gs://c/run", "gs://a/x", "gs://b/y"]
    filesystem.check("/local", config["list"][1:])
    filesystem.check_client("runs/x")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    words = r"cannot be written \(Not a directory\): choose another folder"
    with pytest.raises(UserError, match=words), filesystem.writing(folder):
        folder.mkdir()


def test_a_text_tokenizer_is_the_same_on_every_host():
    program = (
        "from imagegpt_jax.data import text\n"
        "captions = [f'{a} emoji of {b}' for a in ('noto', 'twemoji') for b in ('cat', 'cats', 'act', 'tac')]\n"
        "print(text.train_tokenizer(captions, 300).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment(PYTHONHASHSEED=str(seed), RAYON_NUM_THREADS=str(threads)),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in ((1, 1), (2, 4), (3, 7))
    }
    assert len(prints) == 1
    assert len(prints.pop().strip()) == 16
