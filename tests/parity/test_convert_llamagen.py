"""LlamaGen's files against a small PyTorch reference: tokenizers, class- and text-conditional decoders, and back."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
import references
import tokenizers
import torch
import transformers
from references import relative
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

import imagegpt_jax as ig
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import export
from imagegpt_jax.sampling.batching import run
from imagegpt_jax.sampling.jobs import image_job
from imagegpt_jax.sampling.settings import Sampling
from imagegpt_jax.tasks.decoder.text_encoder import open_encoder

pytestmark = pytest.mark.parity

CODES, CLASSES, GRID, FEATURES = 40, 10, 4, (6, 12)
SIZES = {"codes": CODES, "width": 32, "depth": 3, "heads": 4, "mlp_width": 48, "grid": GRID}


@pytest.fixture(scope="module", params=[4, 2], ids=["all heads", "grouped"])
def by_class(request, tmp_path_factory):
    reference = references.randomize(references.LlamaGen(**SIZES, kv_heads=request.param, classes=CLASSES))
    path = tmp_path_factory.mktemp("c2i") / "c2i.pt"
    torch.save({"model": reference.state_dict(), "steps": 7, "args": argparse.Namespace(image_size=64)}, path)
    return reference, path


def draw_codes(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, CODES, (batch, length))


def test_class_conditional_logits(by_class, shows):
    reference, path = by_class
    gpt = ig.load_decoder(path, heads=4, grid=(GRID, GRID))
    codes, labels = draw_codes(3, GRID**2 - 1), np.array([0, 7, CLASSES])  # the last is "no class"
    space = gpt.setup.space
    assert (space.num_codes, space.class_start, space.begin) == (CODES, CODES, CODES + CLASSES)
    ids = np.concatenate([space.class_start + labels[:, None], codes], axis=1)
    with torch.no_grad():
        expected = reference(reference.condition(torch.tensor(labels)), torch.tensor(codes)).numpy()
    assert relative(gpt.logits(ids), expected) < 1e-5
    shows("llamagen", "logits")
    # The trap: with the prefix turned like any other token, the numbers are others.
    gpt.gpt.config = dataclasses.replace(gpt.gpt.config, rope_zero_prefix=False)
    assert relative(gpt.logits(ids), expected) > 1e-3


def test_greedy_pictures_are_the_same(by_class, shows):
    reference, path = by_class
    gpt = ig.load_decoder(path, heads=4, grid=(GRID, GRID))
    labels = np.array([1, 5])
    codes = torch.zeros(2, 0, dtype=torch.long)
    with torch.no_grad():
        for _ in range(GRID**2):
            logits = reference(reference.condition(torch.tensor(labels)), codes)
            codes = torch.cat([codes, logits[:, -1:].argmax(-1)], dim=1)
    how = Sampling(temperature=0.0)
    ours = run(gpt.gpt, image_job(gpt.setup.layout, [(None, labels)], how), how).tokens
    np.testing.assert_array_equal(ours, codes.numpy())
    shows("llamagen", "greedy")


def test_text_conditional_logits(tmp_path):
    reference = references.randomize(references.LlamaGen(**SIZES, kv_heads=4, features=FEATURES))
    save_file(reference.state_dict(), tmp_path / "t2i.safetensors")
    gpt = ig.load_decoder(tmp_path / "t2i.safetensors", heads=4, grid=(GRID, GRID))
    rng = np.random.default_rng(1)
    features = rng.standard_normal((3, *FEATURES)).astype(np.float32)
    mask = np.array([[1] * 6, [0, 0, 1, 1, 1, 1], [0] * 6], bool)  # padded on the left; the last has no text
    codes = draw_codes(3, 9)
    ids = np.concatenate([np.zeros((3, 1), int), codes], axis=1)
    features_in = torch.tensor(features)
    features_in[2] = reference.cls_embedding.uncond_embedding
    seen = torch.tensor(mask | ~mask.any(1, keepdims=True))
    with torch.no_grad():
        expected = reference(reference.condition(features=features_in), torch.tensor(codes), seen).numpy()
    assert relative(gpt.logits(ids, features=(features, mask)), expected) < 1e-5


def test_a_language_model_reads_the_words_of_a_text_conditional_decoder(tmp_path):
    reference = references.randomize(references.LlamaGen(**SIZES, kv_heads=4, features=FEATURES))
    save_file(reference.state_dict(), tmp_path / "t2i.safetensors")
    config = transformers.GPT2Config(vocab_size=9, n_positions=16, n_embd=FEATURES[1], n_layer=2, n_head=2)
    model = references.randomize(transformers.GPT2LMHeadModel(config), 0.2)
    model.save_pretrained(tmp_path / "gpt2")
    words = {word: i for i, word in enumerate(["a", "red", "boat", "dog", "[UNK]"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "gpt2/tokenizer.json"))
    gpt = ig.load_decoder(tmp_path / "t2i.safetensors", text_encoder=tmp_path / "gpt2", heads=4, grid=(GRID, GRID))
    how, features = Sampling(temperature=0.0), gpt.read(["a red boat", "dog", ""])
    ours = run(gpt.gpt, image_job(gpt.setup.layout, [([[]] * 3, None)], how, features=[features]), how).tokens
    for row, ids in zip(ours, ([0, 1, 2], [3], []), strict=True):
        features, seen = reference.cls_embedding.uncond_embedding[None].clone(), torch.ones(1, FEATURES[0], dtype=bool)
        codes = torch.zeros(1, 0, dtype=torch.long)
        with torch.no_grad():
            if ids:
                features[0] = 0
                features[0, -len(ids) :] = model.transformer(torch.tensor([ids])).last_hidden_state
                seen[0, : -len(ids)] = False
            for _ in range(GRID**2):
                logits = reference(reference.condition(features=features), codes, seen)
                codes = torch.cat([codes, logits[:, -1:].argmax(-1)], dim=1)
        np.testing.assert_array_equal(row, codes[0])
    assert len({tuple(row) for row in ours}) == 3
    with pytest.raises(UserError, match="states of 12 numbers, and the decoder reads features of 13"):
        open_encoder(tmp_path / "gpt2", 6, 13)


def test_heads_of_unpublished_sizes_are_asked_for(by_class):
    with pytest.raises(UserError, match="3 layers of width 32 are no published LlamaGen.*heads"):
        ig.load_decoder(by_class[1])


def test_decoder_round_trip_gives_the_same_bits(by_class, tmp_path, shows):
    reference, path = by_class
    export.convert(path, tmp_path / "portable", heads=4)
    export.convert(tmp_path / "portable", tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    original = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    assert set(written) == set(original)
    for name, array in original.items():
        assert written[name].tobytes() == array.tobytes(), name
    # Beside the weights stand LlamaGen's own arguments, so that reading them again needs no hint.
    assert json.loads((tmp_path / "back" / "config.json").read_text())["n_head"] == 4
    ids = draw_codes(1, 5)
    first, again = (ig.load_decoder(tmp_path / name).logits(ids) for name in ("portable", "back"))
    np.testing.assert_array_equal(first, again)
    shows("llamagen", "bits")


# -------------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Janus' VQVAE is LlamaGen's: its module is the reference, under LlamaGen's names."""
    config = JanusVQVAEConfig(
        base_channels=32,
        channel_multiplier=[1, 1, 2],
        latent_channels=16,
        embed_dim=8,
        num_embeddings=64,
        num_patches=4,
    )
    reference = references.randomize(JanusVQVAE(config), 0.05)
    renamed = {}
    for name, tensor in reference.state_dict().items():
        for theirs, ours in {
            "encoder.down.": "encoder.conv_blocks.",
            "decoder.up.": "decoder.conv_blocks.",
            ".block.": ".res.",
            "mid.block_1": "mid.0",
            "mid.attn_1": "mid.1",
            "mid.block_2": "mid.2",
        }.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    renamed["quantize.codebook_used"] = torch.arange(65536.0)
    path = tmp_path_factory.mktemp("vq") / "vq_ds4.pt"
    torch.save({"model": renamed, "optimizer": {"state": {}}}, path)
    return reference, renamed, path


def test_tokenizer_codes_and_pixels(tokenizer, shows):
    reference, _, path = tokenizer
    tok = ig.load_tokenizer(path, batch_size=1)
    assert (tok.downsample, tok.num_codes) == (4, 64)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        z = reference.quant_conv(reference.encoder(torch.tensor(images).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        z = torch.nn.functional.normalize(z.reshape(-1, 8).double(), dim=-1)
        codebook = torch.nn.functional.normalize(reference.quantize.embedding.weight.double(), dim=-1)
        codes = torch.cdist(z, codebook).argmin(-1).reshape(2, -1)
        pixels = reference.decode(codes).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(tok.encode(images), codes.numpy())
    assert relative(tok.decode(codes.numpy()), np.clip(pixels, -1, 1)) < 1e-4
    shows("llamagen_vq", "codes", "pixels")


def test_tokenizer_round_trip_gives_the_same_bits(tokenizer, tmp_path, shows):
    _, renamed, path = tokenizer
    export.convert(path, tmp_path / "portable")
    export.convert(tmp_path / "portable", tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert set(written) == set(renamed)
    for name, tensor in renamed.items():
        assert written[name].tobytes() == tensor.numpy().tobytes(), name
    shows("llamagen_vq", "bits")


def test_a_tokenizer_becomes_a_folder_that_transformers_loads(tokenizer, tmp_path):
    reference, _, path = tokenizer
    export.convert(path, tmp_path / "janus", to="janus")
    loaded = JanusVQVAE.from_pretrained(tmp_path / "janus")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
