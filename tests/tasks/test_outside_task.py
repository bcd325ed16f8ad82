"""A task in a package outside ours, the one of docs/extending.md: it trains, resumes, is scored and loads."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import imagegpt_jax as ig
from imagegpt_jax import checkpoint, train_state
from imagegpt_jax import config as config_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import export, loading
from imagegpt_jax.tasks import interface

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the package and its config lie."""
    folder = tmp_path_factory.mktemp("outside")
    section = (ROOT / "docs" / "extending.md").read_text().partition("## A task\n")[2].partition("\n## ")[0]
    task, config = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (folder / "my_package").mkdir()
    (folder / "my_package" / "line.py").write_text(task)
    (folder / "line_config.py").write_text(config)
    return folder


def start(folder, binary, *arguments):
    command = [sys.executable, "-m", f"imagegpt_jax.{binary}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the package is found in the current folder
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def run(folder):
    """Workdir of an undisturbed run."""
    finish(start(folder, "train", "--config=line_config.py", "--workdir=run"))
    return folder / "run"


def read(workdir):
    task = interface.find("my_package.line")
    abstract = train_state.abstract(task.init_state, task.setup(config_lib.load(workdir)))
    return checkpoint.load_params(workdir, abstract, "line", 3000)


@pytest.fixture
def importable(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))


def test_killed_it_resumes_to_the_same_bits(run, folder, importable):
    process = start(folder, "train", "--config=line_config.py", "--workdir=killed")
    while process.poll() is None and not checkpoint.steps(folder / "killed"):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 3000 not in checkpoint.steps(folder / "killed")
    finish(start(folder, "train", "--config=line_config.py", "--workdir=killed"))
    jax.tree.map(np.testing.assert_array_equal, read(folder / "killed"), read(run))
    assert (folder / "killed" / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


def test_its_rollouts_made_the_batches(run, importable):
    """Targets pulled away from zero by the sign of what the network says: the slopes end above 1."""
    assert np.all(np.asarray(read(run)["slope"]) > 1.02)


def test_its_evaluators_score_it_in_training_and_later(run, folder):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = [line["validation/distance"] for line in lines if "validation/distance" in line]
    assert len(scored) == 3
    finish(start(folder, "evaluate", "--checkpoint=run", "--output=scores.json"))
    assert json.loads((folder / "scores.json").read_text())["line/validation/distance"] == scored[-1]


def test_it_loads_as_what_it_says_it_is(run, importable, tmp_path):
    loaded = ig.load(run)
    assert (loaded.kind, loaded.step, loaded.config.task) == ("line", 3000, "my_package.line")
    np.testing.assert_array_equal(loaded.module.slope[...], read(run)["slope"])
    for load, kind in ((ig.load_tokenizer, "tokenizer"), (ig.load_decoder, "decoder")):
        with pytest.raises(UserError, match=f"holds a line, not a {kind}"):
            load(run)
    with pytest.raises(UserError, match="a line, which has no portable form"):
        export.convert(run, tmp_path / "portable")


@pytest.mark.parametrize("kind", ["tokenizer", "decoder"])
def test_a_task_of_one_of_our_kinds_loads_as_that(kind, folder, importable, workdirs, tmp_path):
    (folder / "my_package" / f"my_{kind}.py").write_text(f"from imagegpt_jax.tasks.{kind} import TASK\n")
    shutil.copytree(getattr(workdirs, kind), tmp_path / "run")
    config = config_lib.load(tmp_path / "run")
    config.task = f"my_package.my_{kind}"
    config_lib.save(config, tmp_path / "run")
    assert loading.kind_of(tmp_path / "run") == kind
    assert isinstance(ig.load(tmp_path / "run"), {"tokenizer": ig.Tokenizer, "decoder": ig.Decoder}[kind])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokeniser", None, "Did you mean 'tokenizer'"),
        ("my_package.lin", None, "my_package.lin is no module.*PYTHONPATH"),
        ("my_package.empty", "", "has no TASK: write TASK = "),
        ("my_package.other", "TASK = 3", "a TASK that is a int"),
        ("my_package.wrong", "import imagegpt_jax.tasks.interface as i\n"
         "TASK = i.Task(setup=print, init_state=print, train_step=1, batches=print)", "train_step=1.* not callable"),
    ],
)  # fmt: skip
def test_a_task_that_is_none_is_told(name, text, words, folder, importable):
    if text is not None:
        (folder / "my_package" / f"{name.partition('.')[2]}.py").write_text(text)
    with pytest.raises(UserError, match=words):
        interface.find(name)


def test_a_misspelt_or_missing_field_is_an_error():
    with pytest.raises(TypeError, match="train_stp"):
        interface.Task(setup=print, init_state=print, train_stp=print, batches=print)
    with pytest.raises(TypeError, match="train_step"):
        interface.Task(setup=print, init_state=print, batches=print)
