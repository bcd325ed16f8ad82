"""What binaries have in common on the command line: help, misspelt flags, wrong folders."""

import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("name", ["sample", "evaluate", "encode"])
def test_help_is_quick_and_names_every_flag(name):
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-m", f"imagegpt_jax.{name}", "--help"], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert out.returncode == 0
    assert f"python -m imagegpt_jax.{name} --" in out.stdout
    assert "\n  --output\n" in out.stdout
    loaded = "import sys, runpy; sys.argv = ['x', '--help']\n"
    loaded += f"try: runpy.run_module('imagegpt_jax.{name}', run_name='__main__')\n"
    loaded += "except SystemExit: print([m for m in ('jax', 'tensorflow', 'flax', 'orbax') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert out.stdout.strip().endswith("[]")
    assert seconds < 3


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
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
