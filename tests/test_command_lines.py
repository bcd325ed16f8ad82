"""What binaries have in common on the command line: help, misspelt flags, wrong folders."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from imagegpt_jax import cli
from imagegpt_jax.errors import UserError


@pytest.mark.parametrize("name", ["sample", "evaluate", "encode"])
def test_help_is_quick_and_names_every_flag(name):
    before = os.times()
    out = subprocess.run([sys.executable, "-m", f"imagegpt_jax.{name}", "--help"], capture_output=True, text=True)
    seconds = os.times().children_user - before.children_user  # of a processor, whatever else the machine does
    assert out.returncode == 0
    assert f"python -m imagegpt_jax.{name} --" in out.stdout
    assert "\n  --output\n" in out.stdout
    for words in ("repeat this option", "Alias for", "default: 'false'", "default: 'True'"):
        assert words not in out.stdout
    loaded = "import sys, runpy; sys.argv = ['x', '--help']\n"
    loaded += f"try: runpy.run_module('imagegpt_jax.{name}', run_name='__main__')\n"
    loaded += "except SystemExit: print([m for m in ('jax', 'tensorflow', 'flax', 'orbax') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert out.stdout.strip().endswith("[]")
    assert seconds < 3


def help_of(name):
    done = subprocess.run([sys.executable, "-m", f"imagegpt_jax.{name}", "--help"], capture_output=True, text=True)
    groups, title = {}, ""
    for line in done.stdout.splitlines():
        if line.endswith(":") and line[0] != " ":
            title = line
        elif line.startswith("  --"):
            groups.setdefault(title, []).append(line.strip(" -"))
    return groups


def test_help_has_groups_of_which_the_required_flags_are_the_first():
    groups = help_of("encode")
    assert list(groups) == ["Required:", "Optional:"]
    assert groups["Required:"] == ["tokenizer", "data", "output"]
    groups = help_of("sample")
    assert next(iter(groups)) == "Required:"
    assert groups["Required:"] == ["output"]
    assert groups["What to generate:"][:2] == ["prompt", "prompts_file"]
    assert groups["Sampling, by default the decoder's own settings:"][:2] == ["temperature", "top_k"]
    named = [name for group in groups.values() for name in group]
    assert len(named) == len(set(named)) > 50
    assert next(iter(help_of("evaluate"))) == "Scores of checkpoints:"


@pytest.mark.parametrize("name", ["train", "encode", "sample", "evaluate"])
def test_compiled_programs_are_kept_in_the_users_cache(name, tmp_path):
    given = {"encode": ["--tokenizer=/no/such", "--data=emoji:train"], "sample": ["--decoder=/no/such", "--prompt=a"]}
    given |= {"evaluate": ["--checkpoint=/no/such"], "train": ["--config=configs/tokenizer.py", "--config.task=none"]}
    output = f"--{'workdir' if name == 'train' else 'output'}={tmp_path}/o"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment.pop("IMAGEGPT_JAX_CACHE", None)
    command = [sys.executable, "-m", f"imagegpt_jax.{name}", *given[name], output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "imagegpt_jax" / "compiled").is_dir()


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("sample", ["--decoder=x", "--prompt=a"], "--output is required: Folder to write the pictures into."),
        ("encode", ["--output=y"], "--tokenizer is required: Workdir of a trained image tokenizer. --data is required"),
        ("sample", ["--output=y", "--num_samples=4"], "Did you mean 'num_images'"),
        ("sample", ["--output=y", "--num_images=0"], "--num_images=0 is not a positive integer."),
        ("evaluate", ["--protocol=clean-fid"], "Did you mean 'clean_fid'"),
        ("sample", ["--decoder=x", "--output=y", "--promt=a"], "Did you mean 'prompt'"),
        ("sample", ["--output=y", "--prompt=a"], "decoder"),
        ("sample", ["--decoder=x", "--output=y", "--num_images=0"], "num_images"),
        ("evaluate", ["--checkpoint=x", "--outputs=y"], "Did you mean 'output'"),
        ("encode", ["--tokenizer=x", "--data=emoji:train", "--output=y", "--batch_size=many"], "batch_size"),
    ],
)
def test_misspelt_flags_cost_one_sentence(name, flags, words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"imagegpt_jax.{name}", *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sample", ["--decoder=/no/such", "--prompt=a"]),
        ("evaluate", ["--checkpoint=/no/such"]),
        ("encode", ["--tokenizer=/no/such", "--data=emoji:train"]),
    ],
)
def test_a_wrong_folder_does_not_wait_for_jax(name, flags, tmp_path):
    code = f"import sys, runpy; sys.argv = {[name, *flags, f'--output={tmp_path}/o']!r}\n"
    code += f"try: runpy.run_module('imagegpt_jax.{name}', run_name='__main__')\n"
    code += "except SystemExit as e: print(e.code, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False"], done.stderr
    assert "/no/such" in done.stderr


def run(*arguments, cwd, **variables):
    command = [sys.executable, "-m", "imagegpt_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **variables})


def test_one_command_for_all_binaries(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == ["train", "encode", "sample", "evaluate", "convert", "checkpoint", "pack", "demo"]
    assert "Trains an image tokenizer" in done.stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version", cwd=tmp_path).stdout)
    assert run("checkpoint", "--help", cwd=tmp_path).stdout.startswith("usage: ")
    wrong = run("trian", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: unknown command 'trian'. Did you mean 'train'?")
    direct = run("sample", "--help", cwd=tmp_path).stdout
    assert (
        direct
        == subprocess.run([sys.executable, "-m", "imagegpt_jax.sample", "--help"], capture_output=True).stdout.decode()
    )


def test_config_files_are_those_of_the_working_folder_or_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = pathlib.Path(cli.__file__).with_name("configs") / "decoder.py"
    assert cli.find_config("configs/decoder.py:size=B") == cli.find_config("decoder:size=B") == f"{ours}:size=B"
    assert cli.find_config("decoder") == str(ours)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "decoder.py").touch()
    assert cli.find_config("decoder:size=B") == "configs/decoder.py:size=B"
    assert cli.find_config("configs/decoder.py") == "configs/decoder.py"
    (tmp_path / "mine.py").touch()
    assert cli.find_config("mine.py:a=1,b=x:y") == "mine.py:a=1,b=x:y"
    with pytest.raises(UserError, match=r"no config file decodr\. Did you mean 'decoder'\?"):
        cli.find_config("decodr:size=B")
    with pytest.raises(UserError, match="no config file other/decoder.py"):
        cli.find_config("other/decoder.py")


@pytest.mark.parametrize("spelling", [["--config=tokenizer:size=test"], ["--config", "configs/tokenizer.py:size=test"]])
def test_configs_are_read_outside_the_repository(spelling, tmp_path):
    done = run("train", *spelling, "--config.steps=none", f"--workdir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "steps" in done.stderr
    assert not any(tmp_path.iterdir())
