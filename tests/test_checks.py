"""Configs that cannot work end in one sentence before the workdir is there, where the right one is then not refused."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from imagegpt_jax import config as config_lib
from imagegpt_jax import loop, steps
from imagegpt_jax.cli import UserError
from imagegpt_jax.tasks import decoder, tokenizer

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
TASKS = {"tokenizer": tokenizer, "decoder": decoder}


def make(task, changes):
    config = config_lib.sibling(str(CONFIGS / "x.py"), f"{task}.py").get_config("size=test")
    config.data.train = config.data.validation = "emoji:validation,res=16,styles=noto"
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(autouse=True)
def no_step(monkeypatch):
    """What is not found in time fails here, and compiles nothing."""

    def call(*args):
        raise AssertionError("a step was reached")

    monkeypatch.setattr(steps.Steps, "zeros", call)
    monkeypatch.setattr(steps.Steps, "__call__", call)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("tokenizer", {"steps": 0}, "steps=1 or more"),
        ("tokenizer", {"log_every": 0}, "log_every=1 or more"),
        ("tokenizer", {"guard.spike": -1.0}, "guard.spike=-1.0"),
        ("tokenizer", {"guard.window": 0}, "guard.window=1 or more"),
        ("tokenizer", {"guard.patience": -1}, "guard.patience=0 "),
        ("tokenizer", {"guard.max_rollbacks": -1}, "guard.max_rollbacks=0 "),
        ("tokenizer", {"compiler_options": "foo"}, "xla_name=value"),
        ("tokenizer", {"compiler_options": "xla_nonsense=3"}, "xla_nonsense.*--config.compiler_options"),
        ("tokenizer", {"compiler_options": "xla_cpu_enable_fast_math=maybe"}, "maybe"),
        ("tokenizer", {"init_from": "/nonexistent"}, "/nonexistent holds no checkpoint and no weights"),
        ("tokenizer", {"model.attention_heads": 3, "model.mid_attention": True}, "16 channels .* 1, 2, 4, 8, 16"),
        ("tokenizer", {"frozen": ("(",)}, "no regular expression"),
        ("tokenizer", {"frozen": ("e", "o")}, "nothing of the generator to train"),
        ("tokenizer", {"ema_decay": 2.0}, "ema_decay=2.0"),
        ("tokenizer", {"discriminator_optim.lr": -1.0}, "discriminator_optim.lr=-1.0"),
        ("decoder", {"frozen": (".*",)}, "nothing of the decoder to train"),
        ("decoder", {"ema_decay": 1.0}, "ema_decay=1.0"),
        ("decoder", {"optim.b1": 1.5}, "optim.b1=1.5"),
        ("decoder", {"logit_chunk": 0}, "logit_chunk=1 or more"),
        ("decoder", {"data.vocab_multiple": 0}, "data.vocab_multiple=1 "),
        ("decoder", {"data.grid": (3, 3)}, r"--config.data.grid=\(4, 4\)"),
        ("decoder", {"data.eval_ops": "decode|resize(8)|value_range(-1,1)"}, "eval_ops gives images of 8 x 8"),
        ("decoder", {"data.train_ops": "decode|resize(18)|value_range(-1,1)"}, "multiples of 4"),
        ("decoder", {"model.attention": "cudnn", "model.dtype": "bfloat16"}, "needs a GPU.*model.attention=auto"),
        ("decoder", {"sampling.cfg_schedule": "cosin"}, "config.sampling.*Did you mean 'cosine'"),
        ("decoder", {"sampling.top_p": 0.0}, "config.sampling.*top_p=0.0"),
    ],
)
def test_configs_that_cannot_work_leave_nothing_behind(task, changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        loop.run(TASKS[task], make(task, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_pattern_may_freeze_the_whole_discriminator():
    setup = tokenizer.setup(
        make("tokenizer", {"frozen": ("^convs/|^norms/|^out",), "discriminator_optim.name": "muon"})
    )
    made = jax.eval_shape(functools.partial(tokenizer.init_state, setup), jax.random.key(0))
    assert not made.trainable["discriminator"]
    batch = {"image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)}
    after, _ = jax.eval_shape(functools.partial(tokenizer.train_step, setup, "adversarial"), made, batch)
    assert jax.tree.structure(after) == jax.tree.structure(made)
