"""Random configs of every class of `transformers` that is read, at tiny sizes, against the class that wrote the folder.

`PARITY_SWEEP=30` draws thirty configs of each class in place of the few of `make parity`; `PARITY_SEED` other ones.
"""

import os

import numpy as np
import pytest
import references
import round_trips
import torch
import transformers
from transformers.activations import ACT2FN
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
from transformers.models.imagegpt import modeling_imagegpt
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

import imagegpt_jax as ig
from imagegpt_jax.errors import UserError

pytestmark = pytest.mark.parity

COUNT, SEED = (int(os.environ.get(name, value)) for name, value in (("PARITY_SWEEP", 3), ("PARITY_SEED", 0)))
LEARNED = ("prelu", "xielu")  # activations with weights of their own
FIXED = [name for name in ACT2FN if name not in LEARNED]
# Of the squares and the half exponential, values grow beyond what float32 compares well.
MILD = [name for name in FIXED if name not in ("relu2", "linear")]


class Draw:
    """Random choices for one config."""

    def __init__(self, case):
        self.rng = np.random.default_rng((SEED, case))

    def of(self, *options):
        return options[self.rng.integers(len(options))]

    def up_to(self, most, least=1):
        return int(self.rng.integers(least, most + 1))

    def maybe(self, **values):
        """Each of the values with probability one half."""
        return {key: value for key, value in values.items() if self.rng.integers(2)}


def compare(got, expected, tolerance):
    error = np.abs(np.asarray(got) - expected).max()
    assert error <= tolerance * np.abs(expected).max(), error / np.abs(expected).max()


# ---------------------------------------------------------------------------------------------------------- decoders


def rope(draw, head_dim):
    """Parameters of rotary positions of any type."""
    kinds = ("default", "linear", "yarn", "longrope", "llama3", "proportional", "dynamic")
    kind = draw.of(*(kinds if head_dim > 2 else kinds[:-1]))  # of one pair, "dynamic" divides by zero
    values = {"rope_type": kind, "rope_theta": draw.of(100.0, 10000.0, 5e5)}
    factor, original = draw.of(1.0, 2.0, 3.5, 8.0), draw.of(4, 16, 64)
    if kind in ("linear", "dynamic"):
        values |= {"factor": factor}
    if kind == "yarn":
        values |= {"factor": factor, "original_max_position_embeddings": original}
        values |= draw.maybe(beta_fast=16.0, beta_slow=2.0, truncate=False)
        values |= draw.of({}, {"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 0.4}, {"mscale": 0.7})
    if kind == "longrope":
        values |= {"factor": factor, "original_max_position_embeddings": original}
        values |= {f"{name}_factor": (1 + draw.rng.random(head_dim // 2)).tolist() for name in ("short", "long")}
        values |= draw.maybe(attention_factor=1.2)
    if kind == "llama3":
        values |= {"factor": factor, "original_max_position_embeddings": original}
        values |= {"low_freq_factor": 1.0, "high_freq_factor": draw.of(2.0, 4.0)}
    if kind == "proportional":
        values |= {"partial_rotary_factor": draw.of(0.25, 0.5, 1.0)} | draw.maybe(factor=factor)
    return values


def llama(draw):
    heads = draw.of(1, 2, 3, 4, 6)
    width = heads * draw.of(2, 4, 6, 10)
    head_dim = draw.of(None, 2, 8, 12)
    config = transformers.LlamaConfig(
        vocab_size=draw.up_to(60, 2),
        hidden_size=width,
        intermediate_size=draw.up_to(50),
        num_hidden_layers=draw.up_to(3),
        num_attention_heads=heads,
        num_key_value_heads=draw.of(None, 1, *(n for n in range(1, heads + 1) if heads % n == 0)),
        head_dim=head_dim,
        hidden_act=draw.of("silu", *MILD),
        max_position_embeddings=draw.of(4, 16, 64),
        rms_norm_eps=draw.of(1e-6, 1e-3),
        tie_word_embeddings=draw.of(False, True),
        rope_parameters=draw.of(None, *[rope(draw, head_dim or width // heads)] * 4),
        attention_dropout=draw.of(0.0, 0.2),
        **draw.maybe(attention_bias=True, mlp_bias=True),
    )
    return transformers.LlamaForCausalLM(config)


def gpt2_like(draw, config, model, **values):
    heads = draw.up_to(5)
    return model(
        config(
            vocab_size=draw.up_to(60, 3),
            n_positions=draw.up_to(40, 12),
            n_embd=heads * draw.up_to(9),
            n_layer=draw.up_to(3),
            n_head=heads,
            n_inner=draw.of(None, draw.up_to(50)),
            activation_function=draw.of(*MILD),
            layer_norm_epsilon=draw.of(1e-5, 1e-2),
            tie_word_embeddings=draw.of(False, True),
            scale_attn_weights=draw.of(True, True, False),
            **draw.maybe(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
            **draw.maybe(resid_pdrop=0.3, embd_pdrop=0.0, attn_pdrop=0.4),
        )
    )


def gpt2(draw):
    return gpt2_like(draw, transformers.GPT2Config, transformers.GPT2LMHeadModel)


def imagegpt(draw):
    return gpt2_like(draw, transformers.ImageGPTConfig, transformers.ImageGPTForCausalImageModeling)


DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("case", range(COUNT))
@pytest.mark.parametrize("make", [llama, gpt2, imagegpt])
def test_decoders(make, case, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_imagegpt, "torch_float", float)  # see test_convert_transformers.exact_roots
    draw = Draw(case)
    torch.manual_seed(case)
    model = references.randomize(make(draw), 0.2).to(draw.of(*DTYPES))
    folder = tmp_path / "folder"
    model.save_pretrained(folder, max_shard_size=draw.of("5KB", "1GB"))
    model = type(model).from_pretrained(folder, dtype=torch.float32).eval()  # rotary frequencies were never halved
    ids = draw.rng.integers(0, model.config.vocab_size, (2, 11))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    compare(ig.load_decoder(folder).logits(ids), expected, 1e-4)
    round_trips.check(folder, tmp_path, "decoder")


@pytest.mark.parametrize("name", LEARNED)
def test_activations_with_weights_are_refused(name, tmp_path):
    config = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**config, num_attention_heads=2, hidden_act=name)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")  # without arrays: the config is enough
    with pytest.raises(UserError, match=f"the activation '{name}' is not supported"):
        ig.load_decoder(tmp_path)


# -------------------------------------------------------------------------------------------------------- tokenizers


def sizes(draw):
    """What the configs of the tokenizers have in common."""
    return {
        "embed_dim": draw.up_to(12),
        "latent_channels": draw.up_to(12),
        "in_channels": draw.of(3, 3, 1, 4),
        "base_channels": draw.of(32, 32, 64),
        "channel_multiplier": [draw.up_to(3) for _ in range(draw.up_to(3))],
        "num_res_blocks": draw.up_to(2),
    }


def pictures(draw, config, side=16):
    return draw.rng.uniform(-1, 1, (2, side, side, config.in_channels)).astype(np.float32)


def nchw(x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def codes_agree(got, z, codebook):
    """Codes are those of the nearest entries, except where two are as near as rounding can tell."""
    distances = torch.cdist(z.double(), codebook.detach().double()).numpy()
    chosen = np.take_along_axis(distances, got.reshape(-1, 1), 1)[:, 0]
    assert (chosen - distances.min(1)).max() < 1e-5 * distances.max()


def save(model, path, draw):
    model = references.randomize(model, 0.05).to(draw.of(*DTYPES))
    model.save_pretrained(path / "folder")
    round_trips.check(path / "folder", path, "tokenizer")
    return model.float()


@pytest.mark.parametrize("case", range(COUNT))
def test_janus(case, tmp_path):
    draw = Draw(case)
    torch.manual_seed(case)
    values = sizes(draw)
    grid = 16 >> (len(values["channel_multiplier"]) - 1)
    config = JanusVQVAEConfig(
        **values,
        num_embeddings=draw.up_to(99, 2),
        out_channels=draw.of(3, 1, 4),
        num_patches=grid,
        double_latent=draw.of(False, False, True),
    )
    model = save(JanusVQVAE(config), tmp_path, draw)
    tok = ig.load_tokenizer(tmp_path / "folder", batch_size=1)
    codes = draw.rng.integers(0, config.num_embeddings, (2, grid * grid))
    images = pictures(draw, config)
    with torch.no_grad():
        pixels = model.decode(torch.tensor(codes)).permute(0, 2, 3, 1).numpy()
        compare(tok.decode(codes), np.clip(pixels, -1, 1), 1e-4)
        if config.double_latent:
            with pytest.raises(UserError, match="double_latent cannot encode"):
                tok.encode(images)
            return
        z = model.quant_conv(model.encoder(nchw(images))).permute(0, 2, 3, 1).flatten(0, 2)
    z, codebook = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (z, model.quantize.embedding.weight))
    codes_agree(tok.encode(images), z, codebook)


@pytest.mark.parametrize("case", range(COUNT))
def test_chameleon(case, tmp_path):
    draw = Draw(case)
    torch.manual_seed(case)
    config = ChameleonVQVAEConfig(
        **sizes(draw),
        num_embeddings=draw.up_to(99, 2),
        resolution=draw.of(16, 30, 512),
        attn_resolutions=draw.of(None, [], [16], [8, 7], [512, 128, 30]),
        attn_type=draw.of("vanilla", "vanilla", "none"),
    )
    model = save(ChameleonVQVAE(config), tmp_path, draw)
    images = pictures(draw, config)
    with torch.no_grad():
        z = model.quant_conv(model.encoder(nchw(images))).permute(0, 2, 3, 1).flatten(0, 2)
        expected = model.encode(nchw(images)).image_tokens.numpy().ravel()
    got = ig.load_tokenizer(tmp_path / "folder", batch_size=1).encode(images)
    codes_agree(got, z, model.quantize.embedding.weight)
    assert np.mean(got.ravel() == expected) > 0.97


@pytest.mark.parametrize("case", range(COUNT))
def test_emu3(case, tmp_path):
    draw = Draw(case)
    torch.manual_seed(case)
    values = sizes(draw)
    mults, base = values["channel_multiplier"], values["base_channels"]
    values["embed_dim"] = draw.of(values["embed_dim"], values["latent_channels"])
    config = Emu3VQVAEConfig(
        **values,
        codebook_size=draw.up_to(99, 2),
        out_channels=draw.of(3, 1, 4),
        hidden_size=base * mults[-1],
        num_attention_heads=draw.of(1, 2, 8),
        attn_resolutions=draw.of([], [i for i, m in enumerate(mults) if m == mults[-1]], [7]),
        temporal_downsample_factor=draw.of(1, 2, 3, 4, 8),
        double_latent=draw.of(False, False, False, True),
    )
    model = save(Emu3VQVAE(config), tmp_path, draw)
    tok = ig.load_tokenizer(tmp_path / "folder", batch_size=1)
    images, grid = pictures(draw, config), 16 >> (len(mults) - 1)
    codes = draw.rng.integers(0, config.codebook_size, (2, grid, grid))
    with torch.no_grad():
        if config.double_latent:
            with pytest.raises(UserError, match="double_latent cannot encode"):
                tok.encode(images)
        else:
            hidden = model.encoder(nchw(images)[:, None].repeat(1, config.temporal_downsample_factor, 1, 1, 1))
            z = model.quant_conv(hidden.permute(0, 2, 1, 3, 4)).permute(0, 2, 3, 4, 1).flatten(0, 3)
            codes_agree(tok.encode(images), z, model.quantize.embedding.weight)
        if config.embed_dim != config.latent_channels:
            with pytest.raises(UserError, match="decodes only if"):
                tok.decode(codes.reshape(2, -1))
        elif config.temporal_downsample_factor != 3:  # of a number that is no power of two, the reference cannot decode
            pixels = model.decode(torch.tensor(codes)).permute(0, 2, 3, 1).numpy()
            compare(tok.decode(codes.reshape(2, -1)), np.clip(pixels, -1, 1), 1e-4)
