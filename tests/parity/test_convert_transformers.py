"""Decoders in folders that `transformers` writes, read with no other argument, against the classes that wrote them."""

import json

import numpy as np
import pytest
import round_trips
import torch
import transformers
from references import LLAMA, relative, save
from transformers.models.imagegpt import modeling_imagegpt
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

import imagegpt_jax as ig
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import export

pytestmark = pytest.mark.parity

IDS = np.random.default_rng(0).integers(0, 50, (2, 11))


def rope(kind, **values):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


LLAMAS = {
    "plain": {},
    "grouped, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases, heads, activation": {"head_dim": 6, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "linear": rope("linear", factor=2.0),
    "dynamic": rope("dynamic", factor=2.0),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=64),
    "yarn, all keys": rope(
        "yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.4, truncate=False,
        beta_fast=16.0, beta_slow=2.0,
    ),
    "longrope, long": rope(
        "longrope", factor=4.0, original_max_position_embeddings=8,
        short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 3.0, 4.0],
    ),
    "longrope, short": rope(
        "longrope", factor=4.0, original_max_position_embeddings=64,
        short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 3.0, 4.0],
    ),
    "llama3": rope(
        "llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "proportional": rope("proportional", partial_rotary_factor=0.5),
}  # fmt: skip


def llama(**values):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **values}))


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("name", LLAMAS)
def test_llama(name, tmp_path, shows):
    model = save(llama(**LLAMAS[name]), tmp_path / "folder")
    gpt = ig.load_decoder(tmp_path / "folder")
    assert relative(gpt.logits(IDS), logits(model)) < 1e-5
    shows("llama", "logits")
    # Of the same weights without the option, the numbers are others: the option was in force.
    if name != "plain" and "grouped" not in name:
        config = json.loads((tmp_path / "folder/config.json").read_text())
        changed = {**config, "hidden_act": "relu", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
        (tmp_path / "folder/config.json").write_text(json.dumps(changed))
        assert relative(ig.load_decoder(tmp_path / "folder").logits(IDS), logits(model)) > 1e-3


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("name", ["plain", "linear", "dynamic", "llama3", "yarn"])
def test_configs_of_transformers_4_say_the_same(name, key, tmp_path):
    """They have `rope_theta` and `rope_scaling` in place of `rope_parameters`, and leave out what is None."""
    save(llama(**LLAMAS[name]), tmp_path)
    new = ig.load_decoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    kept = {k: v for k, v in config.items() if v is not None and k not in ("head_dim", "attention_bias", "mlp_bias")}
    (tmp_path / "config.json").write_text(json.dumps({**kept, "torch_dtype": "float32"}))
    old = ig.load_decoder(tmp_path)
    assert old.gpt.config == new.gpt.config
    assert old.fingerprint() == new.fingerprint()


GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4}
GPT2S = {
    "plain": {},
    "other": {
        "n_inner": 48,
        "activation_function": "relu",
        "tie_word_embeddings": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
    },
    "unscaled": {"scale_attn_weights": False, "activation_function": "gelu"},
}


@pytest.mark.parametrize("name", GPT2S)
def test_gpt2(name, tmp_path, shows):
    model = save(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **GPT2S[name]})), tmp_path)
    gpt = ig.load_decoder(tmp_path)
    assert relative(gpt.logits(IDS), logits(model)) < 1e-5
    shows("gpt2", "logits")
    with pytest.raises(UserError, match="17 tokens are more than the 16 positions"):
        gpt.logits(np.zeros((1, 17), int))


def test_gpt2_without_its_head_is_tied(tmp_path):
    model = save(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "body")
    np.testing.assert_array_equal(*(ig.load_decoder(tmp_path / name).logits(IDS) for name in ("whole", "body")))


@pytest.fixture(autouse=True)
def exact_roots(monkeypatch):
    """ImageGPT's attention divides by sqrt(H), which transformers 5.17 rounds down to an integer before: not so here.

    Its `utils.torch_float` returns `int(x)`; that of 5.23 returns `float(x)`. The files of both are alike.
    """
    monkeypatch.setattr(modeling_imagegpt, "torch_float", float)


@pytest.mark.parametrize("name", [*GPT2S, "tied"])
def test_imagegpt(name, tmp_path, shows):
    values = {**GPT2, **GPT2S.get(name, {"tie_word_embeddings": True}), "vocab_size": 51}
    model = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**values))
    save(model, tmp_path)
    expected = logits(model)
    assert expected.shape[-1] == (51 if name == "tied" else 50)  # the last id, start of sequence, is never predicted
    assert relative(ig.load_decoder(tmp_path).logits(IDS), expected) < 1e-5
    shows("imagegpt", "logits")


def test_imagegpt_draws_with_its_colours(tmp_path, shows):
    save(
        transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**{**GPT2, "vocab_size": 17})), tmp_path
    )
    colours = np.random.default_rng(0).uniform(-1, 1, (16, 3))
    processor = ImageGPTImageProcessorPil(clusters=colours, size={"height": 4, "width": 4})
    processor.save_pretrained(tmp_path)
    tok, gpt = ig.load_tokenizer(tmp_path, batch_size=1), ig.load_decoder(tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    expected = processor(list(images), input_data_format="channels_last", return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(tok.encode(images), np.stack(expected))
    np.testing.assert_allclose(tok.decode(np.stack(expected)).reshape(3, 16, 3), colours[np.stack(expected)], atol=1e-6)
    assert ig.generate(gpt, tok, [""], num_images=2).shape == (2, 4, 4, 3)
    export.convert(tmp_path, tmp_path / "portable", kind="tokenizer")
    export.convert(tmp_path / "portable", tmp_path / "back")
    assert ig.load_tokenizer(tmp_path / "back", batch_size=1).fingerprint == tok.fingerprint
    shows("imagegpt_clusters", "codes", "pixels", "bits")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "imagegpt"])
def test_greedy_continuations_of_64_tokens_are_the_same(kind, tmp_path, shows):
    if kind == "llama":
        model = llama(max_position_embeddings=128, num_key_value_heads=2)
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, "n_positions": 128}))
    else:
        config = transformers.ImageGPTConfig(**{**GPT2, "n_positions": 128, "vocab_size": 51})
        model = transformers.ImageGPTForCausalImageModeling(config)
    save(model, tmp_path)
    prompt = torch.tensor(IDS[:, :5])
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0)
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings).numpy()
    gpt = ig.load_decoder(tmp_path)
    ids = np.concatenate([IDS[:, :5], np.zeros((2, 64), int)], axis=1)
    for place in range(5, 69):
        ids[:, place] = np.asarray(gpt.logits(ids))[:, place - 1].argmax(-1)
    np.testing.assert_array_equal(ids, expected)
    assert len(np.unique(ids[:, 5:])) > 3
    shows(kind, "greedy")


def test_shards_and_half_precision(tmp_path):
    model = save(llama(), tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    np.testing.assert_array_equal(*(ig.load_decoder(tmp_path / name).logits(IDS) for name in ("one", "shards")))
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder)
        reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert relative(ig.load_decoder(folder).logits(IDS), logits(reference)) < 1e-5


def test_shards_of_pytorchs_own_format(tmp_path):
    """What transformers 4 writes without safetensors."""
    model = save(llama(), tmp_path / "one")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_bytes((tmp_path / "one/config.json").read_bytes())
    state, places = model.state_dict(), {}
    for i, names in enumerate((list(state)[::2], list(state)[1::2])):
        torch.save({name: state[name] for name in names}, tmp_path / f"bin/pytorch_model-{i}.bin")
        places |= dict.fromkeys(names, f"pytorch_model-{i}.bin")
    (tmp_path / "bin/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    np.testing.assert_array_equal(*(ig.load_decoder(tmp_path / name).logits(IDS) for name in ("one", "bin")))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "imagegpt"])
def test_models_without_a_head_of_their_own_are_read_if_it_is_tied(kind, tmp_path):
    tied, sizes = {"tie_word_embeddings": True}, {**GPT2, "vocab_size": 51}
    make = {
        "llama": lambda **how: transformers.LlamaModel(transformers.LlamaConfig(**LLAMA, **how)),
        "gpt2": lambda **how: transformers.GPT2Model(transformers.GPT2Config(**sizes, **how)),
        "imagegpt": lambda **how: transformers.ImageGPTModel(transformers.ImageGPTConfig(**sizes, **how)),
    }[kind]
    body = save(make(**tied), tmp_path / "tied")
    with torch.no_grad():
        states = body(torch.tensor(IDS)).last_hidden_state
        table = body.embed_tokens.weight if kind == "llama" else body.wte.weight
        expected = (states @ table.T).numpy()
    assert relative(ig.load_decoder(tmp_path / "tied").logits(IDS), expected) < 1e-5
    save(make(tie_word_embeddings=False), tmp_path / "untied")
    with pytest.raises(UserError, match=r"without its output head \(lm_head\): save the class that has one"):
        ig.load_decoder(tmp_path / "untied")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "imagegpt"])
def test_decoder_round_trips_give_the_same_bits(kind, tmp_path, shows):
    model = {
        "llama": lambda: llama(num_key_value_heads=2, attention_bias=True),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        "imagegpt": lambda: transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**GPT2)),
    }[kind]()
    save(model.to(torch.bfloat16) if kind == "llama" else model, tmp_path / "folder")
    round_trips.check(tmp_path / "folder", tmp_path, "decoder")
    shows(kind, "bits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "prelu"}, "activation 'prelu' is not supported"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "rope_type 'mrope' is not supported"),
        ({"num_hidden_layers": 2}, r"network does not have: blocks\.2"),
        ({"intermediate_size": 41}, r"gives blocks\.0\.mlp\.\w+\.weight the shape .*40.*, and the network has .*41"),
        ({"model_type": "mamba"}, "model_type 'mamba', and no decoder that is known here"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(change, message, tmp_path):
    save(llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        ig.load_decoder(tmp_path)
