"""Storage that fails for real: files that may not grow, a disk that is full, one that becomes read-only, a slow one."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax.checkpoint import folders
from imagegpt_jax.checkpoint import manifest as manifest_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import event_log, preemption
from imagegpt_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("tiny_task", ROOT / "tests" / "tiny_task.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

MIB = 1 << 20


class Heavy(tiny.Task):
    """The same line to fit, with a megabyte of numbers that do not compress beside it (and their average)."""

    class Network(nnx.Module):
        def __init__(self, *, key):
            self.slope = nnx.Param(jnp.ones(3), axes=(None,))
            self.ballast = nnx.Param(jax.random.normal(key, (MIB // 4,)), axes=(None,))

    def setup(self, config):
        network = train_state.network(lambda key: self.Network(key=key))
        return dataclasses.replace(super().setup(config), networks={"line": network})


@pytest.fixture(autouse=True)
def notice(monkeypatch):
    monkeypatch.setattr(preemption, "current", preemption.Notice())


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return loop.run(Heavy(), tiny.make_config(), tmp_path_factory.mktemp("undisturbed") / "run")


def assert_goes_on(workdir, expected, config=None):
    """The same command again ends where a run ends that nothing happened to."""
    jax.tree.map(np.testing.assert_array_equal, loop.run(Heavy(), config or tiny.make_config(), workdir), expected)
    for step in folders.numbered(workdir):
        manifest_lib.check(folders.root(workdir) / str(step))


def wait_for_save(workdir, step):
    until = time.monotonic() + 60
    while not (workdir / "checkpoints" / str(step) / "manifest.json").exists():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond `size` bytes, as with `ulimit -f`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of so many MiB; it may be made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(megabytes):
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as e:
            pytest.skip(f"only root may mount a small disk here ({e})")
        return folder

    yield mount
    subprocess.run(["umount", "--recursive", str(folder)], check=False, capture_output=True)


def test_a_checkpoint_that_may_not_grow_ends_the_run_and_loses_nothing(expected, tmp_path):
    with contextlib.ExitStack() as stack:

        def hook(drawn):
            if drawn == 5:
                wait_for_save(tmp_path / "run", 4)
                stack.enter_context(largest_file(MIB // 2))

        # The save of step 6 fails in the background; a later step, or the next save, tells.
        with pytest.raises(
            UserError, match=r"checkpoint of step 6 could not be written .*\(File too large\): make room"
        ):
            loop.run(Heavy(hook=hook), tiny.make_config(), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [2, 4]
    assert event_log.read(tmp_path / "run")[-1]["why"].startswith("UserError: the checkpoint of step 6")
    assert_goes_on(tmp_path / "run", expected)


def test_the_last_checkpoint_of_a_run_decides_how_it_ends(tmp_path):
    """Through the binary's own way out: every step succeeds, only the last save fails, after all of them."""
    program = (
        "import resource, sys\n"
        "sys.path.insert(0, 'tests/runtime')\n"
        "from imagegpt_jax import cli\nfrom imagegpt_jax.training import loop\n"
        "import test_storage_faults as t\n"
        "def main():\n"
        "    limit = lambda drawn: drawn == 4 and resource.setrlimit(resource.RLIMIT_FSIZE, (t.MIB // 2,) * 2)\n"
        "    config = t.tiny.make_config(steps=4, **{'checkpoint.every': 0})\n"
        f"    loop.run(t.Heavy(hook=limit), config, {str(tmp_path / 'run')!r})\n"
        "cli.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: the checkpoint of step 4 could not be written to ")
    assert "(File too large): make room" in last
    assert "Traceback" not in done.stderr
    assert checkpoint.steps(tmp_path / "run") == []


def test_a_full_disk_ends_the_run_and_room_on_it_lets_it_go_on(expected, disk, tmp_path):
    folder = disk(12)  # of which a checkpoint takes three
    filler = folder / "filler"

    def hook(drawn):
        if drawn == 5:
            wait_for_save(folder / "run", 4)
            while (folder / "run" / "checkpoints" / "2").exists():  # which makes room
                time.sleep(0.01)
            filler.write_bytes(os.urandom(max(0, os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize - MIB)))

    config = tiny.make_config(**{"checkpoint.keep": 1})
    with pytest.raises(UserError, match=r"(checkpoint of step 6 could not be written|cannot be written) .*make room"):
        loop.run(Heavy(hook=hook), config, folder / "run")
    assert checkpoint.steps(folder / "run") == [4]
    filler.unlink()
    assert_goes_on(folder / "run", expected, config)


def test_a_disk_without_any_room_is_told_at_the_start(disk):
    folder = disk(1)
    (folder / "filler").write_bytes(bytes(MIB - 4096))
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): make room"):
        loop.run(Heavy(), tiny.make_config(), folder / "run")


def test_a_disk_that_becomes_read_only_ends_the_run(expected, disk):
    folder = disk(64)

    def hook(drawn):
        if drawn == 5:
            wait_for_save(folder / "run", 4)
            checkpoints = str(folder / "run" / "checkpoints")
            subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", checkpoints], check=True)

    with pytest.raises(UserError, match="checkpoint of step 6 could not be written .*Read-only file system"):
        loop.run(Heavy(hook=hook), tiny.make_config(), folder / "run")
    assert checkpoint.steps(folder / "run") == [2, 4]
    with pytest.raises(UserError, match="Read-only file system"):  # it is noticed again, and nothing is lost
        loop.run(Heavy(), tiny.make_config(), folder / "run")
    subprocess.run(["umount", str(folder / "run" / "checkpoints")], check=True)
    assert_goes_on(folder / "run", expected)


def test_logs_without_room_end_the_run_with_one_sentence(disk):
    folder = disk(1)

    def hook(drawn):
        if drawn == 5:
            with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    config = tiny.make_config(steps=200, eval_every=0, **{"checkpoint.every": 0})
    with pytest.raises(UserError, match=r"run.* cannot be written \(No space left on device\): make room"):
        loop.run(tiny.Task(hook=hook), config, folder / "run")


def test_a_slow_disk_is_waited_for(expected, tmp_path, monkeypatch):
    written = manifest_lib.write

    def slow(folder, manifest):
        time.sleep(0.3)
        return written(folder, manifest)

    monkeypatch.setattr(manifest_lib, "write", slow)
    state = loop.run(Heavy(), tiny.make_config(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert checkpoint.steps(tmp_path) == [2, 4, 6, 8, 10, 12]
    saves = [e for e in event_log.read(tmp_path) if e["event"] == "save"]
    assert all(e["background_seconds"] >= 0.3 for e in saves)
    assert sum(e["blocking_seconds"] for e in saves[1:]) > 0.3  # a save waits for the one before it
