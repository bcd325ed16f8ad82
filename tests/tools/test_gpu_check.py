import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEST = ("--platform=cpu", "--size=test", "--steps=4", "--batch_size=8")


def check(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "tools/gpu_check.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_gpu_it_is_one_sentence():
    done = check("--platform=gpu", JAX_PLATFORMS="")
    assert done.returncode == 1
    assert done.stderr.startswith("error: JAX finds no GPU here")
    assert len(done.stderr.splitlines()) == 1


def test_stages_report_rates_and_memory(workdirs, tmp_path):
    shutil.copytree(workdirs.tokenizer, tmp_path / "tokenizer")
    results = {}
    for stage in ("decoder", "sampling"):
        done = check(*TEST, f"--stage={stage}", f"--workdir={tmp_path}")
        assert done.returncode == 0, done.stderr
        results[stage] = json.loads(done.stdout.splitlines()[-1])
    for stage, tokens in (("decoder", 30), ("sampling", 16)):  # 12 words, two marks and 16 codes; 16 codes
        result = results[stage]
        assert result["stage"] == stage
        assert result["examples_per_second"] > 0
        assert result["tokens_per_second"] == pytest.approx(tokens * result["examples_per_second"])
        assert result["peak_bytes"] is None  # a CPU does not say
        assert result["host_peak_bytes"] > 1 << 27
    assert len((tmp_path / "decoder" / "timing.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("stage", ["tokenizer", "decoder"])
def test_the_modest_size_is_one_that_training_takes(stage, load_tool, tmp_path):
    import jax

    tool = load_tool("gpu_check.py", "--size=modest")
    config = tool.make_config(stage, tmp_path, devices=2)
    assert config.batch_size == 32
    # Drawing the built-in set at its resolution would take a minute.
    config.data.train = config.data.validation = "emoji:validation,res=16,styles=noto"
    config.data.train_ops = config.data.eval_ops = "decode|resize(128)|value_range(-1,1)"
    if stage == "decoder":
        config.tokenizer = "untrained"
    task = importlib.import_module(f"imagegpt_jax.tasks.{stage}")
    setup = task.setup(config)
    state = jax.eval_shape(lambda key: task.init_state(setup, key), jax.eval_shape(jax.random.key, 0))
    network = "generator" if stage == "tokenizer" else "decoder"
    assert sum(x.size for x in jax.tree.leaves(state.trainable[network])) > 50e6
