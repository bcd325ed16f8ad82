"""docs/extending.md: its code, put into a package outside of ours, is trained with, sampled with and read from."""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagegpt_jax import config as config_lib
from imagegpt_jax import train_state
from imagegpt_jax.convert import networks, portable
from imagegpt_jax.data import sources
from imagegpt_jax.data.interface import Source
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import safety, scorers
from imagegpt_jax.metrics import score
from imagegpt_jax.models.quantizers import Quantizer, QuantizerConfig
from imagegpt_jax.models.vq import VQConfig
from imagegpt_jax.sampling.settings import Sampling
from imagegpt_jax.tasks import tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


SMALL = {"base_width": 4, "width_mults": (1, 1), "norm_groups": 2, "attention_levels": (), "mid_attention": False}
SMALL |= {"encoder_blocks": 1, "decoder_blocks": 1, "mid_blocks": 1}


def ternary(**changes):
    settings = {"kind": "my_package.ternary:TERNARY", "num_codes": 81, "code_dim": 4, "l2_normalize": False}
    return QuantizerConfig(**{**settings, **changes})


def test_the_page_has_an_example_of_each():
    names = ("ternary", "losses", "shapes", "schedules", "metrics", "judges")
    assert set(FILES) == {f"my_package/{name}.py" for name in names}


def test_a_quantizer_decodes_what_it_encodes():
    z = 2 * jax.random.normal(jax.random.key(0), (5, 6, 8))
    graphdef, params = nnx.split(Quantizer(ternary(code_dim=8, groups=2), key=jax.random.key(1)))
    quantized = jax.jit(lambda p, z: nnx.merge(graphdef, p)(z))(params, z)
    np.testing.assert_array_equal(quantized.zq, np.clip(np.round(z), -1, 1))
    quantizer = nnx.merge(graphdef, params)
    np.testing.assert_array_equal(quantizer.nearest(z), quantized.codes)
    np.testing.assert_array_equal(quantizer.lookup(quantized.codes), quantized.zq)
    assert len(np.unique(quantized.codes)) > 30


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_codes": 80}, "4 ternary numbers have 81 codes"),
        ({"depth": 2}, "has no depth: set depth=1"),
        ({"codebook_update": "ema"}, "has no codebook_update"),
        ({"revival_steps": 3}, "has no revival_steps"),
        ({"kind": "my_package.ternary:lookup"}, r"is no quantizers\.Kind"),
        ({"kind": "my_package.ternary:TERNARI"}, "cannot be imported"),
        ({"kind": "vqq"}, "Did you mean 'vq'"),
    ],
)
def test_what_a_quantizer_does_not_provide_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        ternary(**settings)


def test_a_loss_without_a_weight_is_refused(package):
    text = FILES["my_package/ternary.py"].replace('"commitment":', '"commitmnt":')
    (package / "my_package" / "misspelt.py").write_text(text)
    quantizer = Quantizer(ternary(kind="my_package.misspelt:TERNARY"), key=jax.random.key(0))
    with pytest.raises(UserError, match="losses without weights, \\['commitmnt'\\]"):
        quantizer(jnp.ones((2, 4)))


def config(**changes):
    made = config_lib.sibling(str(ROOT / "configs" / "x.py"), "tokenizer.py").get_config("size=test")
    made.model.quantizer.update(
        {"kind": "my_package.ternary:TERNARY", "num_codes": 81, "code_dim": 4, "l2_normalize": False}
        | {"revival_steps": 0, "entropy_weight": 0.0, "codebook_update": "gradient"}
    )
    made.model.update(SMALL)
    made.discriminator.update({"base_width": 4, "num_layers": 1, "norm_groups": 2})
    made.data.train, made.data.validation = (f"my_package.shapes:Shapes:{split}" for split in ("train", "validation"))
    made.loss.update({"gan_kind": "my_package.losses:LEAST_SQUARES", "gan_start": 0, "l2": 0.0, "adaptive": False})
    made.loss.others = "0.5*my_package.losses:charbonnier"
    made.loss.update(changes)
    return made


def test_a_tokenizer_trains_with_a_quantizer_losses_and_data_of_a_users_own():
    made = config()
    assert json.loads(json.dumps(config_lib.to_dict(made)))["loss"]["gan_kind"] == "my_package.losses:LEAST_SQUARES"
    setup = tokenizer.setup(made)
    state = jax.jit(lambda key: tokenizer.init_state(setup, key))(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3), minval=-1, maxval=1)
    (phase,) = [p for p in tokenizer.TASK.phases(setup) if p == tokenizer.TASK.phase(setup, 0)]
    after, values = jax.jit(lambda s, b: tokenizer.train_step(setup, phase, s, b))(state, {"image": images})
    numbers = {name: float(value.compute()) for name, value in values.items()}
    assert numbers["charbonnier"] > 0.1
    expected = 0.5 * numbers["charbonnier"]
    assert numbers["reconstruction"] == pytest.approx(expected, rel=1e-5)
    assert numbers["gan_discriminator"] >= 0
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.trainable, after.trainable)
    assert moved["generator"]["encoder"]["conv_in"]["kernel"] > 0
    assert max(jax.tree.leaves(moved["discriminator"])) > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gan_kind": "hinges"}, "Did you mean 'hinge'"),
        ({"gan_kind": "my_package.losses:charbonnier"}, "is no losses.basic.GanLoss"),
        ({"others": "my_package.losses:charbonnier"}, r"must be WEIGHT\*module:name"),
        ({"others": "-1*my_package.losses:charbonnier"}, "weight below 0"),
        ({"others": "1*my_package.losses:charbonier"}, "cannot be imported"),
    ],
)
def test_losses_that_are_none_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        tokenizer.setup(config(**changes))


def test_a_source_is_opened_alone_and_in_a_mixture():
    source = sources.open_source("my_package.shapes:Shapes:train,res=24", require="captions")
    assert isinstance(source, Source)
    assert len(source) == 64
    assert source.__getitems__([3])[0]["captions"] == ["a bar"]
    mixed = sources.open_source("1*my_package.shapes:Shapes:validation + 2*emoji:validation")
    assert {"square", "bar"} <= set(mixed.label_names)
    for spec, words in (
        ("my_package.shapes:Shapes:train,rs=24", "Did you mean 'res'"),
        ("my_package.shapes:Shapes:train,res=x", "not a whole number"),
        ("my_package.shapes:Shapes", "lacks what comes after my_package.shapes:Shapes"),
        ("my_package.shapes:Shape:train", "cannot be imported"),
    ):
        with pytest.raises(UserError, match=words):
            sources.open_source(spec)


def test_a_schedule_scales_guidance():
    sampling = Sampling(cfg_scale=5.0, cfg_schedule="my_package.schedules:triangle", cfg_power=2.0)
    t = np.arange(10) / 10
    np.testing.assert_allclose(sampling.guidance(10), 1 + 4 * (1 - np.abs(2 * t - 1)) ** 2, rtol=1e-6)
    with pytest.raises(UserError, match="unknown cfg_schedule 'cosin'.* Did you mean 'cosine'"):
        Sampling(cfg_schedule="cosin")


def test_metrics_scorers_and_checkers_are_found():
    assert score.find("my_package.metrics:BRIGHTNESS").output == "pool"
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, ..., 0] = 200
    candidates = scorers.Candidates([], images, np.zeros((2, 1), np.int32), np.zeros(2), None)  # type: ignore[arg-type]
    scores = scorers.find("my_package.judges:redness")(None, candidates)  # type: ignore[arg-type]
    assert scores[1] > scores[0]
    assert safety.find_checker("my_package.judges:too_dark")(images[0]) == 1.0


def test_a_portable_folder_does_not_decide_which_code_is_run(package):
    model = VQConfig(quantizer=ternary(), z_channels=4, **SMALL)
    shapes = train_state.split(networks.network(model).abstract)[1]
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    portable.save_params("tokenizer", model, params, package / "folder", {})
    assert portable.open_portable(package / "folder").config == model  # its code is imported here
    for name in ("my_package.ternary", "my_package"):
        del sys.modules[name]
    with pytest.raises(UserError, match=r"names my_package\.ternary:TERNARY.*import my_package\.ternary first"):
        portable.open_portable(package / "folder")
    assert "my_package.ternary" not in sys.modules
