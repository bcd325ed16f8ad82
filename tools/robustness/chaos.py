"""Kills a training at random moments, again and again, and compares what it ends with to an undisturbed run.

  python tools/robustness/chaos.py --kills=6                                   # both tasks in turn, two processes each
  python tools/robustness/chaos.py --kills=200 --output=docs/chaos.json        # goes on where an earlier call stopped

Each run is `size=test` in two real processes. One of them, or both, are killed with SIGKILL: after a random time, or as
soon as a step, a save, the finishing of a save, an evaluation or a restore is seen to have begun. The same command then
starts again, until the run is through; the SHA-256 of its final state must be that of the run that nobody disturbed.
Exits with status 1 if one differs.

Processes are forked from this one, which has imported the libraries and computed nothing: a start then costs half as
much.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

from absl import flags

from imagegpt_jax import cli, errors
from imagegpt_jax.runtime import event_log, logs

KILLS = flags.DEFINE_integer("kills", 6, "How many kills, with those that the output file has already.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of moments and victims.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file of all kills and results; an existing one is continued.")

ROOT = pathlib.Path(__file__).resolve().parents[2]
TASKS = ("tokenizer", "decoder")
MOMENTS = ("time", "step", "save", "finish", "evaluation", "restore")
VICTIMS = ("first", "second", "both")
# A moment that does not come, such as an evaluation after the last one, is given up after so long without a kill.
_PATIENCE_SECONDS = 180
_POLL_SECONDS = 0.002
_HUNG_SECONDS = 300
_GRACE_SECONDS = 10


def fork(body: Callable[[], None], log: pathlib.Path) -> int:
    """Runs `body` in a process of its own, whose words go to a file; its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        body()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)


class Run:
    """One training of a task in two processes, started as often as it takes.

    Args:
      task: "tokenizer" or "decoder".
      workdir: its folder.
    """

    def __init__(self, task: str, workdir: pathlib.Path):
        self.task, self.workdir = task, workdir
        self.alive: dict[int, int] = {}  # number -> process id

    def start(self) -> None:
        """Starts both processes, as `launch/local.sh --processes=2 --devices=1` does."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._statuses: list[int] = []
        for number in range(2):
            self.alive[number] = fork(lambda number=number: self._train(number, address), self._log(number))

    def _log(self, number: int) -> pathlib.Path:
        return self.workdir.with_name(f"{self.workdir.name}-{number}.log")

    def _train(self, number: int, address: str) -> None:
        os.environ |= {
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,
        }
        flags.FLAGS.unparse_flags()
        flags.FLAGS.remove_flag_values(("kills", "seed", "output"))
        data = "emoji:validation,res=16,styles=noto"
        sys.argv = ["train", f"--config=configs/{self.task}.py:size=test", f"--workdir={self.workdir}"]
        sys.argv += [f"--config.data.{part}={data}" for part in ("train", "validation")]
        runpy.run_module("imagegpt_jax.train", run_name="__main__", alter_sys=False)

    def poll(self) -> bool:
        """Whether a process is still alive."""
        for number, process in list(self.alive.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                del self.alive[number]
                self._statuses.append(os.waitstatus_to_exitcode(status))
        return bool(self.alive)

    def kill(self, number: int) -> bool:
        """Kills a process; whether there was one."""
        if number not in self.alive:
            return False
        os.kill(self.alive[number], signal.SIGKILL)
        return True

    def finish(self) -> tuple[int, str]:
        """Waits for the end; the first exit status that is not 0, and the last words of both processes.

        When one has failed, the other has a while to end by itself, before it is killed as a scheduler would.
        """
        deadline = time.monotonic() + _HUNG_SECONDS
        while self.poll():
            if any(self._statuses):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if time.monotonic() > deadline:
                for number in tuple(self.alive):
                    self.kill(number)
            time.sleep(0.02)
        words = [self._log(n).read_text(errors="replace")[-500:] for n in range(2) if self._log(n).exists()]
        return next((status for status in self._statuses if status), 0), "\n".join(words)

    def digest(self) -> str:
        """SHA-256 of the final state: names, types, shapes and bytes of all arrays."""
        log = self.workdir.with_name("digest.log")
        _, status = os.waitpid(fork(lambda: print(self._digest()), log), 0)
        words = log.read_text().split()
        if status or not words:
            raise errors.UserError(f"the final state of {self.workdir.name} cannot be read: {log.read_text()[-800:]}")
        return words[-1]

    def _digest(self) -> str:
        import jax
        import numpy as np

        from imagegpt_jax.checkpoint import folders, trees

        step = folders.finished(self.workdir)[-1]
        folder = folders.root(self.workdir) / str(step)
        state = trees.read(folder, trees.stored(folder), on_host=True)
        sha = hashlib.sha256(str(step).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            leaf = np.asarray(leaf)
            sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
        return sha.hexdigest()


def preload(cache: pathlib.Path) -> None:
    """Imports what a training imports, and sets what it reads from the environment by then.

    Args:
      cache: folder of compiled programs, which restarts share.
    """
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_", "SLURM_", "OMPI_"))]:
        del os.environ[name]
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    os.chdir(ROOT)
    logs.quiet()
    for name in ("training.loop", "runtime.preemption", "runtime.filesystem", *(f"tasks.{task}" for task in TASKS)):
        importlib.import_module(f"imagegpt_jax.{name}")
    for name in ("clu.metric_writers", "tensorflow"):
        importlib.import_module(name)


def has_come(run: Run, moment: str, wanted: int, begun: int) -> bool:
    """Whether the moment of a kill is there.

    Args:
      run: the run.
      moment: one of `MOMENTS`.
      wanted: of "step", after which one.
      begun: how many events there were at this start.
    """
    if moment in ("step", "evaluation", "restore"):
        events = event_log.read(run.workdir)[begun:]
        kinds = {e["event"] for e in events}
        if moment == "restore":
            return "start" in kinds  # it restores right after
        if moment == "step":
            return any(e["event"] == "steps" and e["step"] >= wanted for e in events)
        # An evaluation begins when the metrics of the steps before it are written: every fourth.
        return any(e["event"] == "steps" and e["step"] % 4 == 0 for e in events)
    checkpoints = run.workdir / "checkpoints"
    if not checkpoints.exists():
        return False
    for folder in checkpoints.iterdir():
        if not folder.name.isdigit() or (folder / "manifest.json").exists():
            continue
        if moment == "save":
            return True
        if (folder / "state").exists():
            return True
    return False


def kill(run: Run, rng: random.Random) -> dict[str, Any] | None:
    """Waits for a random moment and kills; what was done, or None if the run ended before the moment came."""
    moment, victim = rng.choice(MOMENTS), rng.choice(VICTIMS)
    delay, wanted = rng.uniform(0.5, 25.0), rng.randrange(2, 8)
    begun, started = len(event_log.read(run.workdir)), time.monotonic()
    while run.poll() and time.monotonic() - started < _PATIENCE_SECONDS:
        waited = time.monotonic() - started
        if waited >= delay if moment == "time" else has_come(run, moment, wanted, begun):
            break
        time.sleep(_POLL_SECONDS)
    else:
        return None
    if moment != "time":
        time.sleep(rng.uniform(0.0, 0.1))  # somewhere within it
    chosen = {"first": (0,), "second": (1,), "both": (0, 1)}[victim]
    killed = [number for number in chosen if run.kill(number)]
    if not killed:
        return None
    steps = [e["step"] for e in event_log.read(run.workdir) if e["event"] == "steps"]
    return {
        "task": run.task,
        "moment": moment,
        "killed": killed,
        "seconds": round(time.monotonic() - started, 3),
        "logged_step": steps[-1] if steps else 0,
    }


def main() -> None:
    """Runs the campaign."""
    output = pathlib.Path(OUTPUT.value) if OUTPUT.value else None
    record: dict[str, Any] = {"seed": SEED.value, "undisturbed": {}, "kills": [], "runs": []}
    if output is not None and output.exists():
        record = json.loads(output.read_text())

    def keep() -> None:
        if output is not None:
            output.write_text(json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        preload(root / "cache")
        undisturbed = {}
        for task in TASKS:
            run = Run(task, root / f"{task}-undisturbed")
            run.start()
            status, error = run.finish()
            if status:
                raise errors.UserError(f"the undisturbed run of the {task} ended with status {status}: {error[-500:]}")
            undisturbed[task] = run.digest()
        record["undisturbed"] = undisturbed
        number = len(record["runs"])
        while len(record["kills"]) < KILLS.value:
            task = TASKS[number % len(TASKS)]
            rng = random.Random(f"{record['seed']} {number}")
            run = Run(task, root / f"{task}-{number}")
            kills, statuses = [], []
            # The run goes undisturbed to its end once it has had its share.
            share = min(rng.randrange(2, 7), KILLS.value - len(record["kills"]))
            while True:
                run.start()
                done = kill(run, rng) if len(kills) < share else None
                status, error = run.finish()
                statuses.append(status)
                if done is not None and status != 0:
                    kills.append({**done, "run": number, "status": status})
                    continue
                if status == 0:
                    break
                raise errors.UserError(
                    f"{run.workdir.name} ended with status {status} though nobody killed it: {error[-800:]}"
                )
            same = run.digest() == undisturbed[task]
            record["kills"] += kills
            record["runs"].append({"run": number, "task": task, "kills": len(kills), "identical": same})
            number += 1
            keep()
            print(
                f"run {number} ({task}): {len(kills)} kills ({', '.join(k['moment'] for k in kills)}),"
                f" {'identical' if same else 'DIFFERENT'}; {len(record['kills'])} of {KILLS.value} kills",
                flush=True,
            )
    different = [run["run"] for run in record["runs"] if not run["identical"]]
    if different:
        raise errors.UserError(f"the runs {different} ended with another state than the undisturbed one.")


if __name__ == "__main__":
    cli.run(main)
