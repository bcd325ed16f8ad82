"""Every recipe has the published numbers, and its step can be traced at full size (no memory is needed for that)."""

import pathlib

import jax
import numpy as np
import pytest

from imagegpt_jax import config as config_lib
from imagegpt_jax import train_state
from imagegpt_jax.errors import UserError
from imagegpt_jax.tasks import decoder, tokenizer
from imagegpt_jax.training import optimizers

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs"
IMAGENET = 1_281_167
TOKENIZERS = {
    # Published parameters in millions where there are any; optimizer, learning rates at steps, and other numbers.
    "llamagen_vq16": {
        "parameters": 71.9,
        "rates": {0: 1e-4, 400_000: 1e-4},
        "steps": 40 * IMAGENET // 128,
        "batch_size": 128,
        "optim": {"name": "adam", "b1": 0.9, "b2": 0.95, "clip_norm": 1.0, "weight_decay": 0.0},
        "model": {"dtype": "bfloat16", "width_mults": (1, 1, 2, 2, 4), "z_channels": 256},
        "quantizer": {"kind": "vq", "num_codes": 16384, "code_dim": 8, "l2_normalize": True, "commitment_weight": 0.25,
                      "entropy_weight": 0.0},
        "loss": {"l1": 0.0, "l2": 1.0, "lpips": 1.0, "gan": 0.5, "gan_kind": "hinge", "adaptive": False,
                 "gan_start": 20_000},
        "discriminator": {"kind": "patch", "base_width": 64, "num_layers": 3, "norm": "batch"},
    },
    "ibq_16k": {
        "parameters": None,
        "rates": {0: 1e-4, 250 * IMAGENET // 256 - 1: 1e-4, 250 * IMAGENET // 256: 1e-5, 300 * IMAGENET // 256: 1e-6},
        "steps": 330 * IMAGENET // 256,
        "batch_size": 256,
        "optim": {"name": "adam", "b1": 0.5, "b2": 0.9},
        "model": {"z_channels": 256, "attention_levels": (4,)},
        "quantizer": {"kind": "ibq", "num_codes": 16384, "code_dim": 256, "l2_normalize": False, "index_weight": 1.0,
                      "codebook_weight": 0.25, "entropy_weight": 0.05, "entropy_temperature": 0.01},
        "loss": {"l1": 1.0, "l2": 0.0, "lpips": 1.0, "gan": 0.1, "gan_start": 0, "discriminator_first": True,
                 "lecam": 0.05, "adaptive": False},
        "discriminator": {"kind": "patch"},
    },
    "open_magvit2": {
        "parameters": None,
        "rates": {0: 1e-4, 269 * IMAGENET // 256: 1e-4},
        "steps": 270 * IMAGENET // 256,
        "batch_size": 256,
        "optim": {"name": "adam", "b1": 0.5, "b2": 0.9},
        "model": {"quant_conv": False, "z_channels": 18, "attention_levels": ()},
        "quantizer": {"kind": "lfq", "num_codes": 2**18, "code_dim": 18, "l2_normalize": False,
                      "commitment_weight": 0.25, "entropy_weight": 0.1},
        "loss": {"l1": 1.0, "lpips": 1.0, "gan": 0.1, "lecam": 0.05, "gan_start": 0},
        "discriminator": {"kind": "patch"},
    },
    "vqgan_f16": {
        "parameters": None,
        "rates": {0: 4.5e-6 * 128},
        "steps": 500_000,
        "batch_size": 128,
        "optim": {"name": "adam", "b1": 0.5, "b2": 0.9},
        "model": {"base_width": 128, "width_mults": (1, 1, 2, 2, 4), "encoder_blocks": 2, "attention_levels": (4,),
                  "z_channels": 256},
        "quantizer": {"kind": "vq", "num_codes": 16384, "code_dim": 256, "l2_normalize": False},
        "loss": {"l1": 1.0, "lpips": 1.0, "gan": 0.8, "adaptive": True, "gan_start": 250_001},
        "discriminator": {"kind": "patch"},
    },
}  # fmt: skip


def get(task, recipe):
    return config_lib.sibling(str(FOLDER / "x.py"), f"{task}.py").get_config(f"recipe={recipe}")


def assert_has(section, expected):
    assert {k: section[k] for k in expected} == expected


def assert_rates(config, rates):
    for which in ("optim", "discriminator_optim"):
        if which in config:
            schedule = optimizers.schedule(config[which], config.steps)
            np.testing.assert_allclose([schedule(s) for s in rates], list(rates.values()), rtol=1e-3)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def traced(task, setup, config):
    """Millions of parameters, after tracing a step of the last phase on the full batch."""
    made = jax.eval_shape(lambda key: task.init_state(setup, key), jax.eval_shape(jax.random.key, 0))
    batch = task.abstract_batch(setup, config.batch_size)
    phase = task.TASK.phases(setup)[-1]
    after, values = jax.eval_shape(lambda s, b: task.train_step(setup, phase, s, b), made, batch)
    assert shapes(after) == shapes(made)
    assert "loss" in values
    network = "generator" if task is tokenizer else "decoder"
    return train_state.count_params(made.trainable[network]) / 1e6


def test_every_recipe_is_tested():
    tokenizers = config_lib.sibling(str(FOLDER / "x.py"), "tokenizer.py").RECIPES
    decoders = config_lib.sibling(str(FOLDER / "x.py"), "recipes.py").RECIPES
    assert set(TOKENIZERS) == set(tokenizers)
    assert set(DECODERS) == set(decoders)


@pytest.mark.parametrize("recipe", TOKENIZERS)
def test_tokenizer_recipe(recipe):
    config, expected = get("tokenizer", recipe), TOKENIZERS[recipe]
    assert (config.steps, config.batch_size) == (expected["steps"], expected["batch_size"])
    assert_rates(config, expected["rates"])
    assert_has(config.optim, expected["optim"])
    assert_has(config.discriminator_optim, expected["optim"])
    assert_has(config.model, expected["model"])
    assert_has(config.model.quantizer, expected["quantizer"])
    assert_has(config.loss, expected["loss"])
    assert_has(config.discriminator, expected["discriminator"])
    assert "random_resized_crop(256)" in config.data.train_ops
    setup = tokenizer.setup_abstract(config)
    assert tokenizer.phases(setup)[-1] == "adversarial"
    count = traced(tokenizer, setup, config)
    assert expected["parameters"] is None or count == pytest.approx(expected["parameters"], rel=0.001)


LLAMAGEN = {
    "steps": 300 * IMAGENET // 256, "batch_size": 256, "rates": {0: 1e-4, 1_500_000: 1e-4},
    "optim": {"name": "adamw", "b1": 0.9, "b2": 0.95, "weight_decay": 0.05, "clip_norm": 1.0},
    "model": {"norm": "rms", "norm_eps": 1e-5, "bias": False, "mlp": "swiglu", "token_dropout": 0.1,
              "residual_dropout": 0.1, "mlp_dropout": 0.1, "tie_embeddings": False},
    "data": {"guidance_dropout": 0.1, "grid": (16, 16), "num_classes": 1000},
    "codes": 16384,
}  # fmt: skip
# Its words are 120 features of 2048; without drop-out of classes, and from the authors' program for sampling.
T2I = {
    **LLAMAGEN,
    "steps": 50_000_000 // 256,
    "rates": {0: 1e-4, 190_000: 1e-4},
    "model": {**LLAMAGEN["model"], "feature_width": 2048, "feature_length": 120, "feature_begins": True},
    "data": {"guidance_dropout": 0.1, "grid": (16, 16), "use_labels": False, "text_length": 120},
}
RAR = {
    "steps": 250_000, "batch_size": 2048,
    "rates": {0: 4e-4 / 62_500, 62_500: 4e-4, 156_250: (4e-4 + 1e-5) / 2, 250_000: 1e-5},
    "optim": {"name": "adamw", "b1": 0.9, "b2": 0.96, "weight_decay": 0.03, "clip_norm": 1.0},
    "model": {"conditioning": "adaptive_norm", "target_positions": True, "residual_dropout": 0.1, "mlp_dropout": 0.1,
              "attention_dropout": 0.1},
    "data": {"guidance_dropout": 0.1, "grid": (16, 16), "order": {"random_until": 125_000, "raster_from": 187_500}},
    "codes": 1024,
}  # fmt: skip
IMAGEGPT = {
    "steps": 1_000_000, "batch_size": 128, "rates": {1_000_000: 0.0},
    "optim": {"name": "adam", "b1": 0.9, "b2": 0.95},
    "model": {"norm": "rms", "mlp": "gelu", "activation": "quick_gelu"},
    "data": {"grid": (32, 32), "text_length": 0},
    "codes": 512,
}  # fmt: skip
# Recipe -> common numbers, (layers, heads, width, mlp width), published millions of parameters, guidance.
DECODERS = {
    "llamagen_B": (LLAMAGEN, (12, 12, 768, 2048), 111, None),
    "llamagen_L": (LLAMAGEN, (24, 16, 1024, 2816), 343, None),
    "llamagen_XL": (LLAMAGEN, (36, 20, 1280, 3584), 775, None),
    "llamagen_XXL": (LLAMAGEN, (48, 24, 1536, 4096), 1400, None),
    "llamagen_3B": (LLAMAGEN, (24, 32, 3200, 8704), 3100, None),
    "llamagen_t2i_XL": (T2I, (36, 20, 1280, 3584), 775, None),
    "llamagen_t2i_XL_512": (
        {**T2I, "steps": 10_000_000 // 256, "rates": {0: 1e-4}, "data": {**T2I["data"], "grid": (32, 32)}},
        (36, 20, 1280, 3584), 775, None,
    ),
    "llamagen_t2i_1B": (T2I, (22, 32, 2048, 5632), None, None),
    "llamagen_t2i_7B": (T2I, (32, 32, 4096, 11008), None, None),
    "rar_B": (RAR, (24, 16, 768, 3072), 261, (16.0, 2.75)),
    "rar_L": (RAR, (24, 16, 1024, 4096), 461, (15.5, 2.5)),
    "rar_XL": (RAR, (32, 16, 1280, 5120), 955, (6.9, 1.5)),
    "rar_XXL": (RAR, (40, 16, 1408, 6144), 1500, (8.0, 1.2)),
    "imagegpt_S": (IMAGEGPT, (24, 8, 512, 2048), 76, None),
    "imagegpt_M": (IMAGEGPT, (36, 8, 1024, 4096), 455, None),
    "imagegpt_L": (IMAGEGPT, (48, 16, 1536, 6144), 1362, None),
    "after_dalle_mini": (
        {
            "steps": 200_000, "batch_size": 4224, "rates": {0: 1e-8, 10_000: 1e-4, 150_000: 1e-4},
            "optim": {"name": "shampoo", "b1": 0.9, "b2": 0.99},
            "model": {},
            "data": {"grid": (16, 16), "text_length": 64},
            "codes": 16384,
        },
        (12, 16, 1024, 4096), None, None,
    ),
    "after_parti_20b": (
        {
            "steps": 450_000, "batch_size": 8192,
            "rates": {0: 4.5e-5 / 5000, 5000: 4.5e-5, 85_000: 4.5e-5, 450_000: 4.5e-5 * 0.025},
            "optim": {"name": "adafactor", "b1": 0.9, "b2": 0.96, "weight_decay": 0.045, "clip_norm": 4.0},
            "model": {},
            "data": {"grid": (32, 32), "text_length": 128},
            "codes": 8192,
        },
        (64, 64, 4096, 16384), None, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", DECODERS)
def test_decoder_recipe(recipe):
    config = get("decoder", recipe)
    expected, shape, parameters, guidance = DECODERS[recipe]
    assert (config.steps, config.batch_size) == (expected["steps"], expected["batch_size"])
    assert_rates(config, expected["rates"])
    assert_has(config.optim, expected["optim"])
    assert_has(config.model, expected["model"])
    assert_has(config.data.to_dict(), expected["data"])
    assert tuple(config.model[k] for k in ("depth", "heads", "width", "mlp_width")) == shape
    if guidance is not None:
        assert config.sampling.cfg_schedule == "power_cosine"
        assert (config.sampling.cfg_scale, config.sampling.cfg_power) == guidance
    setup = decoder.setup_abstract(config)
    assert setup.space.num_codes == expected["codes"]
    assert setup.tokenizer.model.downsample * config.data.grid[0] in (32, 256, 512)
    count = traced(decoder, setup, config)
    assert parameters is None or count == pytest.approx(parameters, rel=0.01)


def test_imagegpt_takes_an_epoch_to_warm_up():
    config = get("decoder", "imagegpt_S")
    schedule = optimizers.schedule(config.optim, config.steps)
    assert schedule(IMAGENET // 128) == pytest.approx(config.optim.lr)
    assert schedule(IMAGENET // 128 // 2) == pytest.approx(config.optim.lr / 2, rel=1e-3)


def test_llamagen_is_trained_on_ten_crops_cut_at_1_1():
    assert "central_crop(281)|ten_crop(256)" in get("decoder", "llamagen_B").data.train_ops


@pytest.mark.parametrize(("task", "told"), [("tokenizer", "ibq_16k"), ("decoder", "imagegpt_S")])
def test_unknown_recipe_gets_a_suggestion(task, told):
    with pytest.raises(UserError, match=f"Did you mean '{told}'"):
        get(task, told.lower() + "x")


QUANTIZERS = {
    "vq": ("vq", 9.0), "vq_plain": ("vq", 9.0), "vq_ema": ("vq", 9.0), "ibq": ("ibq", 9.0), "fsq": ("fsq", 9.0),
    "lfq": ("lfq", 9.0), "bsq": ("lfq", 9.0), "residual": ("vq", 9.0), "grouped": ("vq", 9.0),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZERS)
def test_any_quantizer_in_any_size(name):
    module = config_lib.sibling(str(FOLDER / "x.py"), "tokenizer.py")
    assert set(QUANTIZERS) == set(module.QUANTIZER_KINDS)
    quantizer = tokenizer.setup_abstract(module.get_config(f"size=emoji,quantizer={name}")).model.quantizer
    bits = quantizer.codes_per_vector * np.log2(quantizer.num_codes)
    assert (quantizer.kind, bits) == QUANTIZERS[name]
