"""The command line of the training binary: mistakes are found in seconds and cost one sentence."""

import os
import subprocess
import sys

import pytest

GOOD = "--config=configs/tokenizer.py:size=test"


def train(*arguments, timeout=60):
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "imagegpt_jax.train", *arguments], capture_output=True, text=True, timeout=timeout
    )
    return done, os.times().children_user - before.children_user  # of a processor, whatever else the machine does


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/tokenizer.py:size=tesst"], "Did you mean 'test'"),
        (["--config=configs/tokenizer.py:sise=test"], "Did you mean 'size'"),
        (["--config=configs/decoder.py:size=xl"], "Did you mean 'XL'"),
        ([GOOD, "--config.optim.lrr=1"], "no key 'optim.lrr'. Did you mean 'optim.lr'?"),
        ([GOOD, "--config.optim.learning_rate=1"], "Did you mean 'optim.lr'"),
        (["--config", "configs/decoder.py:size=test", "--config.model.num_layers", "3"], "Did you mean 'model.depth'"),
        ([GOOD, "--config.optim=3"], "config.optim is a group of keys"),
        ([GOOD, "--config.steps=many"], "--config.steps=many is not an integer."),
        ([GOOD, "--config.model.remat=perhaps"], "--config.model.remat=perhaps is not true or false."),
        ([GOOD, "--config.task=tokeniser"], "Did you mean 'tokenizer'"),
        (["--config=configs/tokeniser.py"], "Did you mean 'tokenizer'"),
        ([GOOD, "--workdri=x"], "Did you mean 'workdir'"),
        ([GOOD, "extra"], "unexpected argument 'extra'"),
    ],
)
def test_mistakes_cost_one_sentence_and_no_device(arguments, words, tmp_path):
    done, seconds = train(*arguments, f"--workdir={tmp_path / 'w'}")
    last = done.stderr.strip().splitlines()
    assert done.returncode != 0
    assert len(last) == 1, done.stderr
    assert last[0].startswith("error: ")
    assert words in last[0]
    assert not set(last[0]) & set('\\"')  # quotes within quotes, as of a KeyError
    assert seconds < 3
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("override", [[], ["--config.a=2"]])
def test_a_config_file_that_fails_is_not_an_unknown_key(override, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    c = ConfigDict({'a': 1})\n    c.b = c.absent\n"
    )
    done, _ = train(f"--config={file}", *override, f"--workdir={tmp_path / 'w'}")
    assert done.stderr == "error: the config file could not be run: AttributeError: absent\n"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.data.train=emoji:trian", "Did you mean 'train'"),
        ("--config.data.train=folder:/no/such/folder", "/no/such/folder"),
        ("--config.data.train_ops=decode|value_rnage(-1,1)", "value_range"),
        ("--config.optim.name=adm", "Did you mean 'adam'"),
        ("--config.batch_size=0", "batch_size"),
        ("--config.loss.lpips=1.0", "convert_lpips"),
        ("--config.mesh.fsdp=3", "does not fit 1 devices"),
    ],
)
def test_configs_that_cannot_work_leave_nothing_behind(override, words, tmp_path):
    done, _ = train(GOOD, override, f"--workdir={tmp_path / 'w'}")
    assert done.returncode != 0
    assert words in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()


def test_a_home_folder_in_a_flag_is_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    done, _ = train(GOOD, "--workdir=~/run")  # no shell is in between
    assert done.stderr.startswith(f"error: {tmp_path / 'run'} exists and is no workdir of a run"), done.stderr


def test_help_is_quick_and_starts_nothing_heavy():
    code = (
        "import sys; sys.argv = ['train', '--help']; import runpy\n"
        "try: runpy.run_module('imagegpt_jax.train', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'jax', 'tensorflow', 'orbax', 'flax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--workdir" in done.stdout
    assert "configs/tokenizer.py" in done.stdout
