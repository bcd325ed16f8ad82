import pathlib
import subprocess
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def launch(tmp_path):
    """Runs a script of launch/ with stand-ins on PATH that record what they are asked, and their input.

    `launch("tpu_vm.sh", "create", ...)` returns its output, its exit status and the recorded commands. What a stand-in
    does besides is given in bash: `launch(..., AS_SRUN="exit 75")`.
    """
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    record = tmp_path / "record"
    for name in ("gcloud", "kubectl", "srun", "squeue", "scontrol", "git"):
        (stand_ins / name).write_text(
            f'#!/usr/bin/env bash\nprintf "%s\\0" {name} "$@" >> "{record}.argv"\nprintf "\\n" >> "{record}.argv"\n'
            f'if [ "$2" = --filename=- ] || [ "$3" = --filename=- ]; then cat >> "{record}.input"; fi\n'
            f'eval "${{AS_{name.upper()}:-}}"\n'
        )
        (stand_ins / name).chmod(0o755)

    def run(script, *arguments, **environment):
        for file in tmp_path.glob("record.*"):
            file.unlink()
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / script), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=tmp_path,
            env={"PATH": f"{stand_ins}:/usr/bin:/bin", "HOME": str(tmp_path), **environment},
        )
        argv, given = tmp_path / "record.argv", tmp_path / "record.input"
        commands = []
        for line in argv.read_text().split("\0\n") if argv.exists() else []:
            commands += [line.split("\0")] if line else []
        return types.SimpleNamespace(
            status=done.returncode,
            output=done.stdout,
            error=done.stderr,
            commands=commands,
            input=given.read_text() if given.exists() else "",
        )

    return run
