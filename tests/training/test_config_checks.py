"""Configs that cannot work end in one sentence before the workdir is there, where the right one is then not refused."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import pytest

from imagegpt_jax import checkpoint
from imagegpt_jax import config as config_lib
from imagegpt_jax.checkpoint import manifest
from imagegpt_jax.errors import UserError
from imagegpt_jax.tasks import decoder, tokenizer
from imagegpt_jax.training import loop, steps

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS, WEIGHTS = ROOT / "configs", ROOT / "tests" / "golden" / "weights"
TASKS = {"tokenizer": tokenizer.TASK, "decoder": decoder.TASK}


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
        ("tokenizer", {"steps": 0}, "--config.steps=0 must be at least 1"),
        ("tokenizer", {"log_every": 0}, "log_every=0 must be at least 1"),
        ("tokenizer", {"guard.spike": -1.0}, "guard.spike=-1.0"),
        ("tokenizer", {"guard.window": 0}, "guard.window=0 must be at least 1"),
        ("tokenizer", {"guard.patience": -1}, r"guard.patience=-1 must be at least 0 \(0 never"),
        ("tokenizer", {"guard.max_rollbacks": -1}, "guard.max_rollbacks=-1 must be at least 0"),
        ("tokenizer", {"compiler_options": "foo"}, "xla_name=value"),
        ("tokenizer", {"compiler_options": "xla_nonsense=3"}, "xla_nonsense.*--config.compiler_options"),
        ("tokenizer", {"compiler_options": "xla_cpu_enable_fast_math=maybe"}, "maybe"),
        ("tokenizer", {"init_from": "/nonexistent"}, "/nonexistent holds no checkpoint and no weights"),
        ("tokenizer", {"model.attention_heads": 3, "model.mid_attention": True}, "16 channels .* 1, 2, 4, 8, 16"),
        ("tokenizer", {"frozen": ("(",)}, "no regular expression"),
        ("tokenizer", {"frozen": ("e", "o")}, "nothing of the generator to train"),
        ("tokenizer", {"frozen": ("^encodr/",)}, r"\^encodr/', which matches no .*Did you mean 'encoder'"),
        (
            "tokenizer",
            {"frozen": ("^encoder/", "zzz")},
            "zzz.* matches no .* discriminator and generator. Known: .*conv",
        ),
        ("decoder", {"frozen": ("blocks/atention",)}, "Did you mean 'blocks/attention'"),
        ("tokenizer", {"checkpoint.keep_best": "psnr"}, "keep_best=validation/psnr"),
        ("tokenizer", {"checkpoint.keep": -1}, r"checkpoint.keep=-1 must be at least 0 \(0 keeps all"),
        ("tokenizer", {"data.quarantine.accept": ("grey",)}, "quarantine.accept has 'grey'"),
        ("tokenizer", {"data.quarantine.max_share": 2.0}, "max_share=2.0"),
        ("tokenizer", {"ema_decay": 2.0}, "ema_decay=2.0"),
        ("tokenizer", {"discriminator_optim.lr": -1.0}, "discriminator_optim.lr=-1.0"),
        ("decoder", {"frozen": (".*",)}, "nothing of the decoder to train"),
        ("tokenizer", {"data.train_ops": "decode|flip_lr"}, r"data.train_ops='decode\|flip_lr\|value_range\(-1,1\)'"),
        ("tokenizer", {"data.eval_ops": "decode|resize(18)|value_range(-1,1)"}, "data.eval_ops .* multiples of 4"),
        ("tokenizer", {"discriminator.num_layers": 3}, "data.train_ops .* discriminator .* at least 24 pixels"),
        ("tokenizer", {"model.out_channels": 1}, "model.out_channels=0"),
        ("tokenizer", {"model.decoder": False}, "model.decoder=True"),
        ("tokenizer", {"discriminator.in_channels": 1}, "--config.discriminator.in_channels=3"),
        ("tokenizer", {"loss.l2": 0.0}, "--config.loss.l2=1"),
        ("tokenizer", {"loss.gan": -0.5}, r"--config.loss.gan=-0.5 must be at least 0 \(0 leaves it out"),
        ("tokenizer", {"optim.drops": (3, "a")}, r"optim.drops=\(3, 'a'\) are not all steps"),
        ("decoder", {"data.order.random_until": -4}, "random_until=-4"),
        ("decoder", {"data.guidance_dropout": 2.0}, "guidance_dropout=2.0 must be at least 0 and at most 1"),
        ("decoder", {"data.image_to_text": -1.0}, "image_to_text=-1.0 must be at least 0 and at most 1"),
        (
            "decoder",
            {"model.position": "learned", "model.max_length": 17, "data.text_length": 12},
            "position 17: .*model.max_length=18 or",
        ),
        ("decoder", {"sample_prompts": (3,)}, "are not all texts"),
        ("decoder", {"ema_decay": 1.0}, "ema_decay=1.0"),
        ("decoder", {"optim.b1": 1.5}, "optim.b1=1.5"),
        ("decoder", {"logit_chunk": 0}, "logit_chunk=0 must be at least 1"),
        ("decoder", {"data.vocab_multiple": 0}, r"data.vocab_multiple=0 must be at least 1 \(1 adds no rows"),
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of both stages, with checkpoints of zeros."""
    root = tmp_path_factory.mktemp("runs")
    for name, task in TASKS.items():
        config = make(name, {})
        setup = task.setup(config)
        config = setup.config
        shapes = jax.eval_shape(functools.partial(task.init_state, setup), jax.random.key(0))
        config_lib.save(config, root / name)
        checkpoints = checkpoint.Checkpoints(root / name, config)
        checkpoints.save(1, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), position=0)
        checkpoints.close()
    shutil.copytree(root / "tokenizer", root / "unsaved", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(root / "tokenizer", root / "edited")
    config = make("tokenizer", {"model.z_channels": 32})
    (root / "edited" / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    return root


@pytest.mark.parametrize(
    ("task", "key", "source", "changes", "words"),
    [
        (
            "tokenizer", "init_from", "tokenizer", {"model.z_channels": 32, "model.dtype": "bfloat16"},
            r"kernel: \(1, 1, 32, 8\) here, \(1, 1, 16, 8\) there.*--config.model.z_channels=16, .*init_partial=True",
        ),
        ("decoder", "init_from", "decoder", {"data.text_vocab_size": 300}, r"embed/weight: \(.*init_partial=True"),
        ("decoder", "init_from", WEIGHTS / "gpt2", {}, r"decoder/\S+: \(.*give config.model the shape"),
        ("decoder", "init_from", "decoder", {"model.depth": 3}, r"decoder/blocks/\S+: .*--config.model.depth=2"),
        ("decoder", "init_from", "tokenizer", {}, "has the networks discriminator, generator.*same task"),
        ("tokenizer", "init_from", WEIGHTS / "gpt2", {}, "holds a GPT-2 .*and no tokenizer"),
        ("decoder", "init_from", WEIGHTS / "janus", {}, "holds a Janus .*and no decoder"),
        ("decoder", "init_from", ROOT / "README.md", {}, "is not a known kind of file"),
        ("decoder", "tokenizer", "/nonexistent", {}, "config.tokenizer=/nonexistent .*no folder"),
        ("decoder", "tokenizer", "unsaved", {}, "config.tokenizer=.* holds no checkpoint yet"),
        ("decoder", "tokenizer", "edited", {}, r"config.tokenizer=.*kernel: \(1, 1, 32, 8\) here, \(1, 1, 16, 8\)"),
    ],
)  # fmt: skip
def test_parameters_of_others_that_do_not_fit_leave_nothing_behind(
    task, key, source, changes, words, runs, tmp_path, monkeypatch
):
    original = manifest.hash_file

    def read_metadata(path):
        assert path.name.startswith("_"), f"{path} was read"
        return original(path)

    monkeypatch.setattr(manifest, "hash_file", read_metadata)
    with pytest.raises(UserError, match=words):
        loop.run(TASKS[task], make(task, {**changes, key: str(runs / source)}), tmp_path / "run")
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
