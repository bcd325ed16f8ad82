"""Tokenizers in folders that `transformers` writes, read with no other argument, against their own classes."""

import numpy as np
import pytest
import round_trips
import torch
import transformers
from references import LLAMA, relative, save
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

import imagegpt_jax as ig
from imagegpt_jax.errors import UserError

pytestmark = pytest.mark.parity

JANUS = {"base_channels": 32, "channel_multiplier": [1, 1, 2], "latent_channels": 16, "embed_dim": 8,
         "num_embeddings": 64, "num_patches": 8, "num_res_blocks": 1}  # fmt: skip
CHAMELEON = {"base_channels": 32, "channel_multiplier": [1, 2, 2], "latent_channels": 16, "embed_dim": 12,
             "num_embeddings": 64, "resolution": 32, "num_res_blocks": 1}  # fmt: skip
EMU3 = {"codebook_size": 64, "embed_dim": 4, "latent_channels": 4, "temporal_downsample_factor": 4, "base_channels": 32,
        "channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 64,
        "num_attention_heads": 2}  # fmt: skip
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
NCHW = torch.tensor(IMAGES).permute(0, 3, 1, 2)


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def check_pixels(tok, codes, pixels):
    assert relative(tok.decode(codes), np.clip(nhwc(pixels), -1, 1)) < 1e-4
    assert np.mean(np.abs(nhwc(pixels)) < 1) > 0.1  # not all of it was clipped


JANUSES = {
    "plain": {},
    "other": {"channel_multiplier": [2, 1, 3], "num_res_blocks": 2, "out_channels": 1},
    "double": {"double_latent": True},
}


@pytest.mark.parametrize("name", JANUSES)
def test_janus(name, tmp_path, shows):
    model = save(JanusVQVAE(JanusVQVAEConfig(**{**JANUS, **JANUSES[name]})), tmp_path, 0.03)
    tok = ig.load_tokenizer(tmp_path, batch_size=1)
    codes = np.random.default_rng(2).integers(0, 64, (2, 64))
    with torch.no_grad():
        check_pixels(tok, codes, model.decode(torch.tensor(codes)))
        if name == "double":
            with pytest.raises(UserError, match="double_latent cannot encode"):
                tok.encode(IMAGES)
            return
        # JanusVQVAE.encode leaves out LlamaGen's normalisation: the definition is written out here.
        z = model.quant_conv(model.encoder(NCHW)).permute(0, 2, 3, 1).reshape(-1, 8).double()
        normalize = torch.nn.functional.normalize
        expected = torch.cdist(normalize(z, dim=-1), normalize(model.quantize.embedding.weight.double(), dim=-1))
    np.testing.assert_array_equal(tok.encode(IMAGES).ravel(), expected.argmin(-1))
    shows("janus", "codes", "pixels")


CHAMELEONS = {
    "plain": {},
    "attention": {"attn_resolutions": [16, 8], "num_res_blocks": 2},
    "no attention": {"attn_resolutions": [16], "attn_type": "none", "channel_multiplier": [2, 2]},
}


@pytest.mark.parametrize("name", CHAMELEONS)
def test_chameleon(name, tmp_path, shows):
    model = save(ChameleonVQVAE(ChameleonVQVAEConfig(**{**CHAMELEON, **CHAMELEONS[name]})), tmp_path, 0.05)
    tok = ig.load_tokenizer(tmp_path, batch_size=1)
    with torch.no_grad():
        expected = model.encode(NCHW).image_tokens.numpy()
    np.testing.assert_array_equal(tok.encode(IMAGES).ravel(), expected)
    assert len(np.unique(expected)) > 3
    shows("chameleon", "codes")
    with pytest.raises(UserError, match="this tokenizer has no decoder"):
        tok.decode(np.zeros((1, 64), int))


EMU3S = {
    "plain": {},
    "other": {"temporal_downsample_factor": 2, "num_res_blocks": 2, "attn_resolutions": [], "out_channels": 1},
}


@pytest.mark.parametrize("name", EMU3S)
def test_emu3(name, tmp_path, shows):
    model = save(Emu3VQVAE(Emu3VQVAEConfig(**{**EMU3, **EMU3S[name]})), tmp_path, 0.05)
    tok = ig.load_tokenizer(tmp_path, batch_size=1)
    with torch.no_grad():
        expected = torch.stack(list(model.encode(NCHW, torch.tensor([[32, 32]] * 2)).image_tokens)).numpy()
        codes = np.random.default_rng(2).integers(0, 64, (2, 16, 16))
        check_pixels(tok, codes.reshape(2, -1), model.decode(torch.tensor(codes)))
    np.testing.assert_array_equal(tok.encode(IMAGES).reshape(2, 16, 16), expected)
    shows("emu3", "codes", "pixels")
    assert len(np.unique(expected)) > 3


@pytest.mark.parametrize("kind", ["janus", "chameleon", "emu3"])
def test_tokenizer_round_trips_give_the_same_bits(kind, tmp_path, shows):
    model = {
        "janus": lambda: JanusVQVAE(JanusVQVAEConfig(**JANUS)),
        "chameleon": lambda: ChameleonVQVAE(ChameleonVQVAEConfig(**CHAMELEON)),
        "emu3": lambda: Emu3VQVAE(Emu3VQVAEConfig(**EMU3)),
    }[kind]()
    save(model, tmp_path / "folder")
    round_trips.check(tmp_path / "folder", tmp_path, "tokenizer")
    shows(kind, "bits")


def test_the_tokenizer_within_a_whole_model_is_found(tmp_path, shows):
    text = {**LLAMA, "model_type": "llama"}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
              "projection_dim": 32}  # fmt: skip
    janus = transformers.JanusForConditionalGeneration(
        transformers.JanusConfig(text_config=text, vision_config=vision, vq_config={**JANUS, "projection_dim": 32,
                                                                                  "image_token_embed_dim": 32})
    )  # fmt: skip
    chameleon = transformers.ChameleonForConditionalGeneration(
        transformers.ChameleonConfig(**LLAMA, num_key_value_heads=4, vq_config=CHAMELEON,
                                     vocabulary_map={"<image>": 1, "IMGIMGBZ": 2})
    )  # fmt: skip
    emu3 = transformers.Emu3ForConditionalGeneration(
        transformers.Emu3Config(text_config={**LLAMA, "pad_token_id": 0, "num_key_value_heads": 4}, vq_config=EMU3,
                                vocabulary_map={"<image>": 1})
    )  # fmt: skip
    for name, whole in {"janus": janus, "chameleon": chameleon, "emu3": emu3}.items():
        save(whole, tmp_path / name / "whole", 0.03)
        whole.model.vqmodel.save_pretrained(tmp_path / name / "alone")
        toks = [ig.load_tokenizer(tmp_path / name / kind, batch_size=1) for kind in ("whole", "alone")]
        np.testing.assert_array_equal(*(tok.encode(IMAGES) for tok in toks))
        assert toks[0].fingerprint == toks[1].fingerprint
        shows(name, "whole")
