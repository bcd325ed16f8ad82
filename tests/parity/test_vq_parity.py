"""VQModel against `transformers`' JanusVQVAE, which is LlamaGen's VQ-16, in PyTorch at random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from imagegpt_jax.models.quantizers import QuantizerConfig
from imagegpt_jax.models.vq import VQConfig, VQModel

pytestmark = pytest.mark.parity

WIDTHS, Z, CODES, CODE_DIM, SIZE, GRID = (1, 1, 2), 16, 64, 8, 32, 8

# Name in JanusVQVAE -> name in ours, part by part.
RULES = [
    (r"encoder\.down\.(\d+)", r"encoder.conv_blocks.\1"),
    (r"decoder\.up\.(\d+)", r"decoder.conv_blocks.\1"),
    (r"\.block\.(\d+)", r".res.\1"),
    (r"\.mid\.block_1", ".mid.0"),
    (r"\.mid\.attn_1", ".mid.1"),
    (r"\.mid\.block_2", ".mid.2"),
    (r"(norm\d?|norm_out)\.weight$", r"\1.scale"),
    (r"quantize\.embedding\.weight$", "quantize.embedding"),
    (r"\.weight$", ".kernel"),
]


def network(conv_impl, params=None):
    config = VQConfig(
        base_width=32,
        width_mults=WIDTHS,
        attention_levels=(2,),
        z_channels=Z,
        conv_impl=conv_impl,
        quantizer=QuantizerConfig(num_codes=CODES, code_dim=CODE_DIM),
    )
    model = VQModel(config, key=jax.random.key(0))
    if params is not None:
        nnx.update(model, nnx.State(params))
    return model


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    reference = JanusVQVAE(
        JanusVQVAEConfig(
            base_channels=32,
            channel_multiplier=list(WIDTHS),
            latent_channels=Z,
            embed_dim=CODE_DIM,
            num_embeddings=CODES,
            num_patches=GRID,
        )
    ).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # biases and norms start trivial, which would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    params = nnx.to_pure_dict(nnx.state(network("xla")))
    flat = {tuple(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    arrays = {}
    for name, tensor in reference.state_dict().items():
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        array = tensor.numpy()
        arrays[tuple(name.split("."))] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    assert {n: a.shape for n, a in arrays.items()} == {n: a.shape for n, a in flat.items()}
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(arrays[tuple(str(k.key) for k in path)]), params
    )
    return reference, network("xla", params), network("winograd", params)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (2, SIZE, SIZE, 3)).astype(np.float32)


def nchw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(got, expected, tolerance):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_encoder_features(models, images):
    reference, ours, _ = models
    with torch.no_grad():
        features = reference.encoder(nchw(images))
        expected = reference.quant_conv(features)
    assert_close(ours.encoder(images), nhwc(features), 1e-5)
    assert_close(ours.encode(images), nhwc(expected), 1e-5)


def test_codes_are_the_nearest_on_the_unit_sphere(models, images):
    # JanusVQVAE.encode leaves out LlamaGen's normalisation, so the definition is written out here, in float64.
    reference, ours, _ = models
    with torch.no_grad():
        z = reference.quant_conv(reference.encoder(nchw(images))).permute(0, 2, 3, 1).reshape(-1, CODE_DIM).double()
        z = torch.nn.functional.normalize(z, dim=-1)
        codebook = torch.nn.functional.normalize(reference.quantize.embedding.weight.double(), dim=-1)
        expected = torch.cdist(z, codebook).argmin(-1).reshape(2, GRID, GRID).numpy()
    codes = np.asarray(ours.encode_codes(images))
    assert len(np.unique(codes)) > 3
    np.testing.assert_array_equal(codes, expected)


def test_decoder_pixels(models):
    reference, ours, _ = models
    codes = np.random.default_rng(1).integers(0, CODES, (2, GRID, GRID))
    with torch.no_grad():
        entries = reference.quantize.get_codebook_entry(torch.from_numpy(codes.reshape(2, -1)))
        expected = reference.decoder(reference.post_quant_conv(entries))
    assert_close(ours.quantize.lookup(codes), nhwc(entries), 1e-6)
    assert_close(ours.decode_codes(jnp.asarray(codes)), nhwc(expected), 1e-5)


def test_gradient_of_the_last_layer(models, images):
    reference, ours, _ = models
    codes = np.random.default_rng(1).integers(0, CODES, (2, GRID, GRID))
    entries = reference.quantize.get_codebook_entry(torch.from_numpy(codes.reshape(2, -1)))
    pixels = reference.decoder(reference.post_quant_conv(entries))
    (expected,) = torch.autograd.grad((pixels - nchw(images)).square().mean(), reference.decoder.conv_out.weight)
    features = ours.decode_features(ours.quantize.lookup(codes))

    def loss(layer):
        return jnp.mean(jnp.square(layer(features) - images))

    gradient = jax.grad(loss)(ours.decoder.conv_out).kernel[...]
    assert_close(gradient, expected.numpy().transpose(2, 3, 1, 0), 1e-5)


def test_winograd_stays_within_tolerance(models, images):
    reference, direct, winograd = models
    programs = [str(jax.make_jaxpr(lambda x, m=m: m.encode(x))(images)) for m in (direct, winograd)]
    assert programs[0].count("conv_general_dilated") > programs[1].count("conv_general_dilated")
    with torch.no_grad():
        expected = reference.quant_conv(reference.encoder(nchw(images)))
    assert_close(winograd.encode(images), nhwc(expected), 1e-5)
