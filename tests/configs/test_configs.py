"""Every shipped config: strict, and its networks can be built and stepped (abstractly: no size is too large)."""

import pathlib

import jax
import pytest

from imagegpt_jax import config as config_lib
from imagegpt_jax import train_state
from imagegpt_jax.config import to_dataclass
from imagegpt_jax.errors import UserError
from imagegpt_jax.models import gpt, vq
from imagegpt_jax.models.gpt_config import GPTConfig

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs"
SIZES = {"tokenizer": ("test", "emoji", "vq16", "vq8"), 
         "decoder": ("test", "emoji", "B", "L", "XL", "XXL", "3B", "7B", "20B")}  # fmt: skip
ALL = [(name, size) for name, sizes in SIZES.items() for size in sizes]
# Published sizes in millions; LlamaGen's decoders have 1001 classes and 16384 codes, embedded and unembedded apart.
PARAMETERS = {("tokenizer", "vq16"): 71.9, ("decoder", "B"): 111, ("decoder", "L"): 343, ("decoder", "XL"): 775,
              ("decoder", "XXL"): 1411, ("decoder", "3B"): 3096,
              ("decoder", "7B"): 6620, ("decoder", "20B"): 20480}  # fmt: skip


def get(name, arg):
    return config_lib.sibling(str(FOLDER / "x.py"), f"{name}.py").get_config(arg)


def build(name, config):
    if name == "tokenizer":
        model = to_dataclass(vq.VQConfig, config.model)
        return train_state.network(lambda key: vq.VQModel(model, key=key))
    model = to_dataclass(GPTConfig, {**config.model.to_dict(), "vocab_size": 1001 + 16384})
    return train_state.network(lambda key: gpt.GPT(model, key=key))


def test_every_size_is_tested():
    for name, sizes in SIZES.items():
        module = config_lib.sibling(str(FOLDER / "x.py"), f"{name}.py")
        assert set(sizes) == set(module.MODELS)


@pytest.mark.parametrize(("name", "size"), ALL)
def test_networks_build_at_full_size_without_memory(name, size):
    net = build(name, get(name, f"size={size}"))
    count = train_state.count_params(jax.tree.leaves(net.abstract)) / 1e6
    if (name, size) in PARAMETERS:
        assert count == pytest.approx(PARAMETERS[name, size], rel=0.015)
    assert count > 0


@pytest.mark.parametrize(("name", "size"), ALL)
def test_a_workdir_keeps_the_config_whole(name, size, tmp_path):
    config = get(name, f"size={size}")
    config_lib.save(config, tmp_path)
    config_lib.check_workdir(config, tmp_path)
    assert config_lib.to_dict(config_lib.load(tmp_path)) == config_lib.to_dict(config)


@pytest.mark.parametrize("name", SIZES)
def test_unknown_size_gets_a_suggestion(name):
    with pytest.raises(UserError, match="Did you mean 'emoji'"):
        get(name, "size=emjoi")


@pytest.mark.parametrize("name", SIZES)
def test_resolution_changes_the_data(name):
    assert "res=64" in get(name, "size=emoji,res=64").data.train


def test_code_grid_follows_resolution_and_tokenizer():
    assert tuple(get("decoder", "size=emoji,res=64").data.grid) == (16, 16)
    assert tuple(get("decoder", "size=B").data.grid) == (16, 16)
