import os
import pathlib
import subprocess
import sys

from imagegpt_jax import images

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_every_task_has_its_picture(workdirs, tmp_path):
    command = [sys.executable, "tools/docs/draw_tasks.py", f"--decoder={workdirs.decoder}", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tasks = {"words", "unconditional", "wide", "interpolate"}
    tasks |= {"inpaint", "outpaint", "complete", "variations", "edit", "style_transfer"}
    assert {path.stem for path in tmp_path.iterdir()} == tasks
    assert images.read_metadata((tmp_path / "edit.png").read_bytes())["task"] == "edit"
    done = subprocess.run([*command, "--concepts=red-hart"], cwd=ROOT, capture_output=True, text=True)
    assert "Did you mean 'red-heart'" in done.stderr


def test_a_decoder_of_classes_draws_some_of_each(workdirs, tmp_path):
    command = [sys.executable, "tools/docs/draw_tasks.py", f"--decoder={workdirs.classes}", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name == "classes.png"
    assert images.read_metadata(path.read_bytes())["task"] == "classes"
