"""Checkpoints and whole runs on `gs://`, through the clients that programs use, against a stand-in on this machine."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from imagegpt_jax import checkpoint
from imagegpt_jax.checkpoint import folders
from imagegpt_jax.checkpoint.__main__ import main
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import event_log, filesystem
from imagegpt_jax.training import loop


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TESTS = pathlib.Path(__file__).resolve().parents[1]
fake_gcs = _load("fake_gcs", TESTS / "runtime" / "fake_gcs.py")
tiny = _load("tiny_task", TESTS / "tiny_task.py")
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="the certificate is made with openssl")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with fake_gcs.serving(tmp_path_factory.mktemp("gcs")) as (held, variables), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield held


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def flip(bucket, below):
    """Flips a bit of the largest file below a folder."""
    name = max((n for n in bucket.names(below) if "manifest" not in n), key=lambda n: len(bucket.objects[n][1]))
    data = bytearray(bucket.objects[name][1])
    data[len(data) // 2] ^= 16
    bucket.put(name, bytes(data))


def test_a_run_in_a_bucket_stops_goes_on_and_falls_back(bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing may land here
    expected = loop.run(tiny.Task(), tiny.make_config(), tmp_path / "local")
    workdir = "gs://bucket/run"

    config = tiny.make_config(**{"checkpoint.keep": 3})
    assert_same(loop.run(tiny.Task(), config, workdir), expected)
    assert folders.finished(workdir) == checkpoint.steps(workdir) == [8, 10, 12]
    assert {name.split("/")[2] for name in bucket.names("run/checkpoints/")} == {"8", "10", "12"}
    manifest = json.loads(bucket.objects["run/checkpoints/12/manifest.json"][1])
    files = {f"run/checkpoints/12/{name}" for name in manifest["files"]}
    assert files == set(bucket.names("run/checkpoints/12/")) - {"run/checkpoints/12/manifest.json"}
    assert event_log.read(workdir)[-1]["why"] == "finished"
    local, remote = (tmp_path / "local" / "metrics.jsonl").read_bytes(), bucket.objects["run/metrics.jsonl"][1]
    assert local == remote
    assert [p.name for p in tmp_path.iterdir()] == ["local"]

    # One file is damaged, one is gone: the step before them counts, and the run ends where it did.
    flip(bucket, "run/checkpoints/12/")
    del bucket.objects[max(bucket.names("run/checkpoints/10/"))]
    assert main(["verify", workdir]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1].rstrip(":") for line in said] == ["sound", "damaged", "damaged"]
    again = tiny.Task()
    assert_same(loop.run(again, config, workdir), expected)
    assert again.drawn[0] == 8 * 4
    assert "the checkpoint of step 12 is damaged and set aside" in capsys.readouterr().err
    assert {n.split("/")[3] for n in bucket.names("run/checkpoints/damaged/")} == {"10", "12"}
    assert main(["verify", workdir]) == 0
    assert main(["diff", workdir]) == 0
    assert "position: 40 -> 48" in capsys.readouterr().out


def test_a_bucket_that_is_not_there_is_told(bucket):
    filesystem.check("gs://bucket/nothing/yet")
    with pytest.raises(UserError, match=r"there is no bucket gs://another: check its name"):
        filesystem.check("gs://another/run")


def test_a_save_that_was_cut_off_in_a_bucket_is_no_checkpoint(bucket, capsys):
    workdir = "gs://bucket/cut"
    config = tiny.make_config(steps=4)
    expected = loop.run(tiny.Task(), config, workdir)
    del bucket.objects["cut/checkpoints/4/manifest.json"]
    bucket.put("cut/checkpoints/4/manifest.json.tmp", b"")
    del bucket.objects["cut/checkpoints/4/state/commit_success.txt"]
    time.sleep(6)  # for five seconds TensorFlow takes what it saw for what is there
    assert main(["ls", workdir]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["4", "unfinished"]
    task = tiny.Task()
    assert_same(loop.run(task, config, workdir), expected)
    assert task.drawn[0] == 2 * 4
    assert not bucket.names("cut/checkpoints/damaged/")
    assert not capsys.readouterr().err.count("damaged")


def test_a_bucket_that_refuses_to_be_written_ends_the_run_with_its_cause(bucket):
    """In a process of its own: TensorFlow tries again when it forgets a file, and holds the interpreter meanwhile."""
    program = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import tiny_task\n"
        "from imagegpt_jax import cli\nfrom imagegpt_jax.training import loop\n"
        "cli.run(lambda: loop.run(tiny_task.Task(), tiny_task.make_config(), 'gs://bucket/refused'))\n"
    )
    bucket.closed = "refused/checkpoints/6"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=TESTS.parent,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)},
            capture_output=True,
            text=True,
            timeout=150,
        )
    finally:
        bucket.closed = ""
    assert done.returncode == 1, done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: the checkpoint of step 6 could not be written to gs://bucket/refused/checkpoints")
    assert "storage.objects.create access" in last
    assert "Traceback" not in done.stderr
    assert folders.finished("gs://bucket/refused") == [2, 4]
