"""Launch scripts: the commands that they run, recorded by stand-ins; a dry run prints these very commands."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ("local.sh", "tpu_vm.sh", "gke.sh", "slurm.sbatch")
HERE = ("--name=vq", "--zone=z")
SUBMIT = ("submit", "--name=vq", "--image=i", "--accelerator=a")
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
        ("local.sh", ["--", "x"], "PYTHON=/no/such/python is no program"),
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
        ("tpu_vm.sh", ["setup", *HERE, "--mount=gs://data/sub"], "--mount=gs://data/sub is no bucket"),
        ("tpu_vm.sh", ["setup", *HERE, "--mount=a b;rm"], "--mount=a b;rm is no bucket"),
        ("gke.sh", ["submit", "--name=Vq"], "--name='Vq' is no name"),
        ("gke.sh", ["submit", "--name=vq-"], "--name='vq-' is no name"),
        ("gke.sh", ["submit", f"--name={'v' * 41}"], "at most 40"),
        ("gke.sh", ["status", "--name=vq", "--", "x"], "takes no arguments"),
        ("gke.sh", [*SUBMIT, "--topology=2x2", "--slices=0", "--", "x"], "--slices=0"),
        ("gke.sh", [*SUBMIT, "--topology=2x2", "--restarts=x", "--", "x"], "--restarts=x"),
        ("gke.sh", [*SUBMIT, "--topology=2x2", "--mount=gs://data/sub/", "--", "x"], "is no bucket"),
        ("gke.sh", [*SUBMIT, "--gpu", "--hosts=2", "--chips=0", "--", "x"], "--chips=0"),
        ("gke.sh", [*SUBMIT, "--gpu", "--hosts=2", "--topology=2x2", "--", "x"], "--topology is for TPUs"),
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
    done = launch(script, *arguments, PYTHON="/no/such/python")
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
    assert printed(real) == real.commands
    for made in {*re.findall(r"/imagegpt_jax\.\w+/", real.output)}:  # a folder of its own for each real run
        real.output = real.output.replace(made, "/imagegpt_jax.XXXXXX/")
    assert dry.output == real.output


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
    assert all("gcsfuse --implicit-dirs -o ro data ~/data" in c[-1] for c in rest[2:])


def test_setup_leaves_no_archive(launch, tmp_path):
    made = 'for word in "$@"; do case $word in --output=*) echo x > "${word#*=}" ;; esac; done'
    (tmp_path / "tmp").mkdir()
    archives = set()
    for _ in range(2):
        done = launch("tpu_vm.sh", "setup", *HERE, AS_GIT=made, TMPDIR=str(tmp_path / "tmp"))
        assert done.status == 0, done.error
        archives.add(done.commands[0][5].removeprefix("--output="))
    assert len(archives) == 2
    assert all(a.startswith(str(tmp_path / "tmp")) for a in archives)
    assert not list((tmp_path / "tmp").iterdir())


def on_a_worker(home, command):
    """Runs what a command of gcloud runs on a worker, whose home is a folder."""
    sent = command[-1].removeprefix("--command=")
    environment = {"HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin"}
    return subprocess.run(["bash", "-c", sent], env=environment, capture_output=True, text=True, timeout=10)


def test_setup_mounts_once(launch, tmp_path):
    mount = launch("tpu_vm.sh", "setup", *HERE, "--mount=gs://data").commands[-1]
    for name, body in {
        "gcsfuse": 'test ! -e "$HOME/mounted" && echo "$@" > "$HOME/mounted"',
        "mountpoint": 'test -e "$HOME/mounted"',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for _ in range(2):
        assert on_a_worker(tmp_path, mount).returncode == 0
    assert (tmp_path / "mounted").read_text() == f"--implicit-dirs -o ro data {tmp_path}/data\n"


@pytest.mark.parametrize("action", ["setup", "stop"])
def test_every_slice_is_asked_though_one_fails(action, launch):
    fails = 'case $* in *" ssh vq-0 "*) exit 3 ;; *" ssh vq-1 "*) exit 4 ;; esac'
    done = launch("tpu_vm.sh", action, *HERE, "--slices=3", AS_GCLOUD=fails)
    assert done.status == 3
    assert [c[5] for c in done.commands if c[4] == "ssh"] == ["vq-0", "vq-1", "vq-2"]


def test_what_run_sends_starts_the_program_and_stop_ends_it(launch, tmp_path):
    (tmp_path / "imagegpt_jax").mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$PWD" "$@"\nsleep 60\n')
    python.chmod(0o755)
    may_run, run = launch("tpu_vm.sh", "run", *HERE, "--", *ARGS).commands
    (stop,) = launch("tpu_vm.sh", "stop", *HERE).commands
    assert on_a_worker(tmp_path, stop).returncode == 0  # nothing runs, and nothing has
    assert on_a_worker(tmp_path, may_run).returncode == 0
    assert on_a_worker(tmp_path, run).returncode == 0
    log = tmp_path / "run.log"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        time.sleep(0.1)
    assert log.read_text().splitlines() == [str(tmp_path / "imagegpt_jax"), "-m", "imagegpt_jax.train", *ARGS]
    refused = on_a_worker(tmp_path, may_run)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: already running: stop it first")
    assert on_a_worker(tmp_path, stop).returncode == 0
    pid = (tmp_path / "run.pid").read_text().strip()
    subprocess.run(["bash", "-c", f"while kill -0 {pid}; do sleep 0.1; done"], stderr=subprocess.DEVNULL, timeout=10)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as another:
        for stale in (pid, another.pid):  # of a program that has ended: its number may be another's by now
            (tmp_path / "run.pid").write_text(f"{stale}\n")
            assert on_a_worker(tmp_path, may_run).returncode == 0
            assert on_a_worker(tmp_path, stop).returncode == 0
        assert another.poll() is None
        another.kill()


def test_a_second_run_is_refused_before_anything_starts(launch):
    done = launch("tpu_vm.sh", "run", *HERE, "--slices=2", "--", *ARGS, AS_GCLOUD='[ "$5" != vq-1 ]')
    assert done.status == 1
    assert [c[5] for c in done.commands] == ["vq-0", "vq-1"]
    assert not any("imagegpt_jax.train" in c[-1] for c in done.commands)


def test_slurm_starts_one_step_with_the_cpus_of_the_job(launch):
    done = launch(
        "slurm.sbatch", "--binary=encode", "--", *ARGS, SLURM_JOB_ID="7", PYTHON="py", SLURM_CPUS_PER_TASK="12"
    )
    (step,) = done.commands
    assert step[0] == "srun"
    assert step[-4:] == ["-m", "imagegpt_jax.encode", *ARGS]
    assert "--cpus-per-task=12" in step[1:-5]


# As srun does with two tasks: the highest status; with --kill-on-bad-exit=1 the first that is not 0 ends the other.
AS_SRUN = """
case " $* " in *" --kill-on-bad-exit=1 "*) kills=true ;; *) kills=false ;; esac
while [[ $1 == --* ]]; do shift; done
tasks=() highest=0
for i in 0 1; do SLURM_PROCID=$i "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do
  code=0; wait "$task" || code=$?
  [ "$code" = 0 ] || ! $kills || kill "${tasks[@]}" 2> /dev/null
  [ "$code" -le "$highest" ] || highest=$code
done
exit "$highest"
"""


@pytest.mark.parametrize(
    ("statuses", "state", "status", "requeued"),
    [
        ((75, 75), "RUNNING", 75, True),
        ((75, 75), "COMPLETING", 75, False),  # scancel: SLURM would take it back
        ((75, 76), "RUNNING", 76, False),
        ((1, 1), "RUNNING", 1, False),
        ((0, 0), "RUNNING", 0, False),
    ],
)
def test_slurm_requeues_what_was_saved_and_not_cancelled(statuses, state, status, requeued, launch, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f"#!/usr/bin/env bash\nstatuses={statuses}\nsleep 0.$((3 * SLURM_PROCID))\n".replace(",", "")
        + 'exit "${statuses[SLURM_PROCID]}"\n'
    )
    python.chmod(0o755)
    stand_ins = {"AS_SRUN": AS_SRUN, "AS_SQUEUE": f"echo {state}"}
    done = launch("slurm.sbatch", "--", "x", SLURM_JOB_ID="7", PYTHON=str(python), **stand_ins)
    assert done.status == status
    assert (["scontrol", "requeue", "7"] in done.commands) == requeued


def test_slurm_says_when_it_may_not_requeue(launch):
    stand_ins = {"AS_SRUN": "exit 75", "AS_SQUEUE": "echo RUNNING", "AS_SCONTROL": "exit 1"}
    done = launch("slurm.sbatch", "--", "x", SLURM_JOB_ID="7", **stand_ins)
    assert done.status == 75
    assert done.error.startswith("error: SLURM does not requeue job 7: ")
    assert len(done.error.splitlines()) == 1


def test_local_prints_the_command_of_each_process(launch):
    done = launch("local.sh", "--processes=2", "--devices=3", "--dry_run", "--", *ARGS, PYTHON="python3")
    assert [command[-5:] for command in printed(done)] == [["python3", "-m", "imagegpt_jax.train", *ARGS]] * 2
    for index, command in enumerate(printed(done)):
        assert {f"JAX_PROCESS_ID={index}", "JAX_NUM_PROCESSES=2", "JAX_NUM_CPU_DEVICES=3"} < set(command)


def start_local(tmp_path, body):
    """Two processes whose program is in bash: 3 s at most, ready when they have made a file each."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\n[ "$1" = -m ] || exec "{sys.executable}" "$@"\n{body}\n'
        f'echo $$ > "{tmp_path}/ready.$JAX_PROCESS_ID"\nfor i in {{1..30}}; do sleep 0.1; done\n'
    )
    python.chmod(0o755)
    launched = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "--", "x"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs the tests in the background may have it ignored, which a shell cannot change.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    while len([f for f in tmp_path.glob("ready.*") if f.read_text()]) < 2:
        assert launched.poll() is None, launched.communicate()
        time.sleep(0.05)
    return launched


def test_local_ends_all_when_its_terminal_is_closed(tmp_path):
    launched = start_local(tmp_path, "")
    launched.send_signal(signal.SIGHUP)
    launched.communicate(timeout=10)
    assert launched.returncode == 130
    pids = [f.read_text().strip() for f in tmp_path.glob("ready.*")]
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("to", ["launcher", "group"])
def test_local_shows_the_last_words_of_what_saves_at_a_signal(to, tmp_path):
    launched = start_local(tmp_path, """trap 'sleep 0.5; echo "saved $JAX_PROCESS_ID" >&2; exit 75' TERM""")
    if to == "launcher":
        launched.send_signal(signal.SIGTERM)
    else:
        os.killpg(launched.pid, signal.SIGTERM)
    _, error = launched.communicate(timeout=10)
    assert launched.returncode == 75
    assert sorted(line for line in error.splitlines() if "saved" in line) == ["[1] saved 1", "saved 0"]
