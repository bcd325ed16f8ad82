"""Launch scripts: the commands that they run, recorded by stand-ins; a dry run prints these very commands."""

import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ("local.sh", "tpu_vm.sh", "gke.sh", "slurm.sbatch")
HERE = ("--name=vq", "--zone=z")
ARGS = ("--config=configs/tokenizer.py:size=vq16", "--workdir=gs://b/a run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(script):
    path = LAUNCH / script
    shellcheck = shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    command = [shellcheck, "--external-sources", f"--source-path={LAUNCH.parent}", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert path.stat().st_mode & 0o111


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, launch):
    done = launch(script, "--help")
    assert done.status == 0
    assert "--dry_run" in done.output
    assert not done.commands


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("local.sh", ["--processes=0", "--", "x"], "--processes=0"),
        ("local.sh", ["--devices=x", "--", "x"], "--devices=x"),
        ("local.sh", ["--binary=sample", "--", "x"], "--binary=sample"),
        ("local.sh", ["--config=x"], "come after --"),
        ("local.sh", [], "nothing to run"),
        ("tpu_vm.sh", [], "none of create"),
        ("tpu_vm.sh", ["creat", *HERE], "'creat' is none of create"),
        ("tpu_vm.sh", ["create", "--zone=z"], "--name is missing"),
        ("tpu_vm.sh", ["create", "--name=vq"], "--zone is missing"),
        ("tpu_vm.sh", ["create", *HERE], "--type is missing"),
        ("tpu_vm.sh", ["create", *HERE, "--type=v9-8"], "give --version"),
        ("tpu_vm.sh", ["create", *HERE, "--type=v4-8", "--slices=x"], "--slices=x"),
        ("tpu_vm.sh", ["create", *HERE, "--tpye=v4-8"], "unknown argument '--tpye=v4-8'"),
        ("tpu_vm.sh", ["run", *HERE], "nothing to run"),
        ("tpu_vm.sh", ["logs", *HERE, "--", "x"], "takes no arguments"),
        ("gke.sh", ["submit", "--name=Vq"], "--name='Vq' is no name"),
        ("gke.sh", ["submit", "--name=vq", "--", "x"], "--image is missing"),
        ("gke.sh", ["submit", "--name=vq", "--image=i", "--", "x"], "--accelerator is missing"),
        (
            "gke.sh",
            ["submit", "--name=vq", "--image=i", "--accelerator=a", "--topology=16", "--", "x"],
            "--topology='16'",
        ),
        (
            "gke.sh",
            ["submit", "--name=vq", "--image=i", "--accelerator=a", "--topology=3x3", "--", "x"],
            "9 chips, which do not divide over hosts of 4",
        ),
        ("gke.sh", ["submit", "--gpu", "--name=vq", "--image=i", "--accelerator=a", "--", "x"], "how many GPU nodes"),
        ("gke.sh", ["submit", "--name=vq", "--image=i", "--accelerator=a", "--topology=2x2"], "nothing to run"),
        ("slurm.sbatch", [], "nothing to run"),
        ("slurm.sbatch", ["--", "--config=x"], "no SLURM job"),
        ("slurm.sbatch", ["--config=x"], "come after --"),
    ],
)
def test_mistakes_cost_one_sentence(script, arguments, words, launch):
    done = launch(script, *arguments)
    assert done.status == 2
    assert not done.commands
    assert len(done.error.splitlines()) == 1, done.error
    assert done.error.startswith("error: ")
    assert words in done.error


def printed(done):
    return [shlex.split(line) for line in done.output.splitlines()]


TPU = "gcloud compute tpus tpu-vm"
QUEUED = "gcloud compute tpus queued-resources"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["create", *HERE, "--type=v4-128"],
            [f"{TPU} create vq --zone=z --accelerator-type=v4-128 --version=tpu-ubuntu2204-base"],
        ),
        (
            ["create", *HERE, "--project=p", "--type=v6e-256", "--queued", "--spot"],
            [
                f"{QUEUED} create vq --zone=z --project=p --accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e"
                " --spot --node-id=vq"
            ],
        ),
        (
            ["create", *HERE, "--type=v5litepod-256", "--slices=2"],
            [
                f"{QUEUED} create vq --zone=z --accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite"
                " --node-count=2 --node-prefix=vq"
            ],
        ),
        (["status", *HERE], [f"{TPU} describe vq --zone=z"]),
        (["status", *HERE, "--queued"], [f"{QUEUED} describe vq --zone=z"]),
        (["logs", *HERE], [f"{TPU} ssh vq --zone=z --worker=0 --command=tail -n 100 -f ~/run.log"]),
        (["delete", *HERE], [f"{TPU} delete vq --zone=z --quiet"]),
        (["delete", *HERE, "--slices=2"], [f"{QUEUED} delete vq --zone=z --force --quiet"]),
    ],
)
def test_tpu_vm_asks_gcloud(arguments, expected, launch):
    done = launch("tpu_vm.sh", *arguments)
    assert done.status == 0, done.error
    assert [" ".join(command) for command in done.commands] == expected


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("tpu_vm.sh", ["create", *HERE, "--type=v5p-128", "--spot"]),
        ("tpu_vm.sh", ["setup", *HERE, "--slices=2", "--mount=gs://data"]),
        ("tpu_vm.sh", ["run", *HERE, "--slices=2", "--", *ARGS]),
        ("tpu_vm.sh", ["stop", *HERE]),
        ("gke.sh", ["status", "--name=vq", "--namespace=n"]),
        ("gke.sh", ["logs", "--name=vq"]),
        ("gke.sh", ["delete", "--name=vq"]),
        ("slurm.sbatch", ["--", *ARGS]),
    ],
)
def test_a_dry_run_prints_the_commands_of_a_real_one_and_runs_none(script, arguments, launch):
    real = launch(script, *arguments, SLURM_JOB_ID="7")
    dry = launch(script, arguments[0], "--dry_run", *arguments[1:]) if script != "slurm.sbatch" else None
    dry = dry or launch(script, "--dry_run", *arguments)
    assert (real.status, dry.status) == (0, 0), real.error + dry.error
    assert real.commands
    assert not dry.commands
    assert printed(dry) == real.commands
    assert printed(real) == real.commands


def test_setup_copies_to_every_worker_of_every_slice(launch):
    done = launch("tpu_vm.sh", "setup", *HERE, "--slices=2", "--mount=gs://data")
    archive, first, second, *rest = done.commands
    assert archive[:2] == ["git", "-C"]
    assert "HEAD" in archive
    assert {c[4] for c in (first, second)} == {"scp"}
    assert (first[6], second[6]) == ("vq-0:imagegpt_jax.tar.gz", "vq-1:imagegpt_jax.tar.gz")
    assert [c[5] for c in rest] == ["vq-0", "vq-1"] * 2
    assert all("--worker=all" in c for c in (first, second, *rest))
    assert all("[tpu,gcs]" in c[-1] for c in rest[:2])
    assert all(c[-1].endswith("gcsfuse --implicit-dirs -o ro data ~/data") for c in rest[2:])


def test_what_run_sends_starts_the_program_and_stop_ends_it(launch, tmp_path):
    (tmp_path / "imagegpt_jax").mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$PWD" "$@"\nsleep 60\n')
    python.chmod(0o755)
    sent = launch("tpu_vm.sh", "run", *HERE, "--", *ARGS).commands[0][-1].removeprefix("--command=")
    stop = launch("tpu_vm.sh", "stop", *HERE).commands[0][-1].removeprefix("--command=")
    subprocess.run(["bash", "-c", sent], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, timeout=10, check=True)
    log = tmp_path / "run.log"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        time.sleep(0.1)
    assert log.read_text().splitlines() == [str(tmp_path / "imagegpt_jax"), "-m", "imagegpt_jax.train", *ARGS]
    done = subprocess.run(["bash", "-c", stop], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, timeout=10)
    assert done.returncode == 0
    pid = (tmp_path / "run.pid").read_text().strip()
    subprocess.run(["bash", "-c", f"while kill -0 {pid}; do sleep 0.1; done"], stderr=subprocess.DEVNULL, timeout=10)


def test_slurm_starts_one_step_whose_first_failure_ends_all(launch):
    done = launch("slurm.sbatch", "--binary=encode", "--", *ARGS, SLURM_JOB_ID="7", PYTHON="py")
    assert done.commands == [["srun", "--kill-on-bad-exit=1", "py", "-m", "imagegpt_jax.encode", *ARGS]]


def test_local_prints_the_command_of_each_process(launch):
    done = launch("local.sh", "--processes=2", "--devices=3", "--dry_run", "--", *ARGS, PYTHON="python3")
    assert [command[-5:] for command in printed(done)] == [["python3", "-m", "imagegpt_jax.train", *ARGS]] * 2
    for index, command in enumerate(printed(done)):
        assert {f"JAX_PROCESS_ID={index}", "JAX_NUM_PROCESSES=2", "JAX_NUM_CPU_DEVICES=3"} < set(command)
