"""Kills a training at random moments, again and again, and compares what it ends with to an undisturbed run.

  python tools/chaos.py --kills=6                                   # both tasks in turn, two processes each
  python tools/chaos.py --kills=200 --output=docs/chaos.json        # goes on where an earlier call stopped

Each run is `size=test` in two real processes. One of them, or both, are killed with SIGKILL: after a random time, or as
soon as a step, a save, the finishing of a save, an evaluation or a restore is seen to have begun. The same command then
starts again, until the run is through; the SHA-256 of its final state must be that of the run that nobody disturbed.
Exits with status 1 if one differs.
"""

import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from imagegpt_jax import cli, events

KILLS = flags.DEFINE_integer("kills", 6, "How many kills, with those that the output file has already.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of moments and victims.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file of all kills and results; an existing one is continued.")

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = ("tokenizer", "decoder")
MOMENTS = ("time", "step", "save", "finish", "evaluation", "restore")
VICTIMS = ("first", "second", "both")
# A moment that does not come, such as an evaluation after the last one, is given up after so long without a kill.
_PATIENCE_SECONDS = 180
_POLL_SECONDS = 0.002


class Run:
    """One training of a task in two processes, started as often as it takes.

    Args:
      task: "tokenizer" or "decoder".
      workdir: its folder.
      cache: folder of compiled programs, which restarts share.
    """

    def __init__(self, task: str, workdir: pathlib.Path, cache: pathlib.Path):
        self.task, self.workdir, self._cache = task, workdir, cache

    def start(self) -> subprocess.Popen[str]:
        """Starts both processes."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "SLURM_", "OMPI_"))}
        environment = kept | {
            "PYTHON": sys.executable,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self._cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        command = ["bash", "launch/local.sh", "--processes=2", "--devices=1", "--"]
        command += [f"--config=configs/{self.task}.py:size=test", f"--workdir={self.workdir}"]
        command += ["--config.data.train=emoji:validation,res=16,styles=noto"]
        command += ["--config.data.validation=emoji:validation,res=16,styles=noto"]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, launched: subprocess.Popen[str]) -> tuple[int, str]:
        """Waits for the end; the exit status and what was said."""
        try:
            _, error = launched.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(launched.pid, signal.SIGKILL)
            _, error = launched.communicate()
            return -1, error + "\nhung for 300 s"
        return launched.returncode, error

    def processes(self) -> dict[int, int]:
        """Number -> process id of the run's processes that are alive."""
        found = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                if f"--workdir={self.workdir}".encode() not in command or b"imagegpt_jax.train" not in command:
                    continue
                if b"bash" in command[0] or command[0] == b"env":
                    continue
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            number = next((v[15:] for v in variables if v.startswith(b"JAX_PROCESS_ID=")), None)
            if number is not None:
                found[int(number)] = int(folder.name)
        return found

    def digest(self) -> str:
        """SHA-256 of the final state: names, types, shapes and bytes of all arrays."""
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        folders = self.workdir / "checkpoints"
        step = max(int(p.name) for p in folders.iterdir() if p.name.isdigit())
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(folders / str(step) / "state").item_metadata.tree
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            state = reader.restore(
                folders / str(step) / "state", args=ocp.args.PyTreeRestore(tree, restore_args=arguments)
            )
        sha = hashlib.sha256(str(step).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            leaf = np.asarray(leaf)
            sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
        return sha.hexdigest()


def has_come(run: Run, moment: str, wanted: int, begun: int) -> bool:
    """Whether the moment of a kill is there.

    Args:
      run: the run.
      moment: one of `MOMENTS`.
      wanted: of "step", after which one.
      begun: how many events there were at this start.
    """
    if moment in ("step", "evaluation", "restore"):
        found = events.read(run.workdir)[begun:]
        kinds = {e["event"] for e in found}
        if moment == "restore":
            return "start" in kinds  # it restores right after
        if moment == "step":
            return any(e["event"] == "steps" and e["step"] >= wanted for e in found)
        # An evaluation begins when the metrics of the steps before it are written: every fourth.
        return any(e["event"] == "steps" and e["step"] % 4 == 0 for e in found)
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


def kill(run: Run, launched: subprocess.Popen[str], rng: random.Random) -> dict[str, Any] | None:
    """Waits for a random moment and kills; what was done, or None if the run ended before the moment came."""
    moment, victim = rng.choice(MOMENTS), rng.choice(VICTIMS)
    delay, wanted = rng.uniform(0.5, 25.0), rng.randrange(2, 8)
    begun, started = len(events.read(run.workdir)), time.monotonic()
    while launched.poll() is None and time.monotonic() - started < _PATIENCE_SECONDS:
        waited = time.monotonic() - started
        if waited >= delay if moment == "time" else has_come(run, moment, wanted, begun):
            break
        time.sleep(_POLL_SECONDS)
    else:
        return None
    if moment != "time":
        time.sleep(rng.uniform(0.0, 0.1))  # somewhere within it
    alive = run.processes()
    chosen = {"first": (0,), "second": (1,), "both": (0, 1)}[victim]
    killed = []
    for number in chosen:
        if number in alive:
            try:
                os.kill(alive[number], signal.SIGKILL)
                killed.append(number)
            except ProcessLookupError:
                continue
    if not killed:
        return None
    steps = [e["step"] for e in events.read(run.workdir) if e["event"] == "steps"]
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
        cache = root / "cache"
        cache.mkdir(mode=0o700)
        undisturbed = {}
        for task in TASKS:
            run = Run(task, root / f"{task}-undisturbed", cache)
            status, error = run.finish(run.start())
            if status:
                raise cli.UserError(f"the undisturbed run of the {task} ended with status {status}: {error[-500:]}")
            undisturbed[task] = run.digest()
        record["undisturbed"] = undisturbed
        number = len(record["runs"])
        while len(record["kills"]) < KILLS.value:
            task = TASKS[number % len(TASKS)]
            rng = random.Random(f"{record['seed']} {number}")
            run = Run(task, root / f"{task}-{number}", cache)
            kills, statuses = [], []
            # The run goes undisturbed to its end once it has had its share.
            share = min(rng.randrange(2, 7), KILLS.value - len(record["kills"]))
            while True:
                launched = run.start()
                done = kill(run, launched, rng) if len(kills) < share else None
                status, error = run.finish(launched)
                statuses.append(status)
                if done is not None and status != 0:
                    kills.append({**done, "run": number, "status": status})
                    continue
                if status == 0:
                    break
                raise cli.UserError(
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
        raise cli.UserError(f"the runs {different} ended with another state than the undisturbed one.")


if __name__ == "__main__":
    cli.run(main)
