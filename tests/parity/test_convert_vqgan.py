"""VQGANs of taming-transformers, of dalle-mini and of MaskGIT against PyTorch references under their names."""

import zlib

import jax
import numpy as np
import pytest
import references
import torch
from flax import linen, serialization
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

import imagegpt_jax as ig
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import export

pytestmark = pytest.mark.parity

LEVELS, SIDE, GRID = 3, 16, 4
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)
NCHW = torch.tensor(IMAGES).permute(0, 3, 1, 2)
CODES = np.random.default_rng(2).integers(0, 64, (2, GRID, GRID))


@pytest.fixture(scope="module")
def taming():
    """Janus' VQVAE is the network of taming's `VQModel`, whose decoder counts levels from the highest resolution."""
    config = JanusVQVAEConfig(
        base_channels=32,
        channel_multiplier=[1, 1, 2],
        latent_channels=16,
        embed_dim=12,
        num_embeddings=64,
        num_patches=4,
    )
    reference = references.randomize(JanusVQVAE(config), 0.05)
    renamed = {}
    for name, tensor in reference.state_dict().items():
        parts = name.split(".")
        if parts[1] == "up":
            parts[2] = str(LEVELS - 1 - int(parts[2]))
        renamed[".".join(parts)] = tensor
    with torch.no_grad():
        codes, unit_codes = (reference.encode(x).image_tokens.numpy() for x in (NCHW, (NCHW + 1) / 2))
        entries = reference.quantize.embedding(torch.tensor(CODES)).permute(0, 3, 1, 2)
        pixels = reference.decoder(reference.post_quant_conv(entries)).permute(0, 2, 3, 1).numpy()
    return renamed, codes, pixels, unit_codes


UNIT = (NCHW + 1) / 2  # as dalle-mini and MaskGIT have their pixels


def check(path, codes, pixels):
    tok = ig.load_tokenizer(path, batch_size=1)
    np.testing.assert_array_equal(tok.encode(IMAGES).ravel(), codes.ravel())
    assert len(np.unique(codes)) > 3
    expected = np.clip(pixels, -1, 1)
    np.testing.assert_allclose(tok.decode(CODES.reshape(2, -1)), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    return tok


def test_taming_from_a_lightning_checkpoint(taming, tmp_path, shows):
    renamed, codes, pixels, _ = taming
    extra = {"loss.discriminator.main.0.weight": torch.zeros(3), "loss.logvar": torch.zeros(())}
    torch.save({"epoch": 3, "state_dict": {**renamed, **extra}, "lr_schedulers": []}, tmp_path / "last.ckpt")
    check(tmp_path / "last.ckpt", codes, pixels)
    shows("taming", "codes", "pixels")


def test_taming_round_trip(taming, tmp_path, shows):
    (tmp_path / "folder").mkdir()
    save_file(taming[0], tmp_path / "folder/model.safetensors")
    export.convert(tmp_path / "folder", tmp_path / "portable")
    export.convert(tmp_path / "portable", tmp_path / "back")
    written = load_file(tmp_path / "back/model.safetensors")
    assert set(written) == set(taming[0])
    assert all(written[name].tobytes() == tensor.numpy().tobytes() for name, tensor in taming[0].items())
    shows("taming", "bits")


def test_a_codebook_on_the_sphere_cannot_become_tamings(taming, tmp_path):
    save_file(taming[0], tmp_path / "vq.safetensors")
    with pytest.raises(UserError, match="no LlamaGen VQ-16, VQ-8: that has no quantizer.l2_normalize=False"):
        export.convert(tmp_path / "vq.safetensors", tmp_path / "out", to="llamagen_vq")


def test_dalle_mini_from_flax(taming, tmp_path, shows):
    renamed, _, pixels, codes = taming
    tree = {}
    for name, tensor in renamed.items():
        parts = name.split(".")
        array, last = tensor.numpy(), parts[-1]
        path = []
        for part in parts[:-1]:
            if part.isdecimal():
                path[-1] += f"_{part}"
            else:
                path.append(part)
        if array.ndim == 4:
            array, last = array.transpose(2, 3, 1, 0), "kernel"
        elif "norm" in path[-1]:
            last = {"weight": "scale"}.get(last, last)
        elif path[-1] == "embedding":
            last = "embedding"
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = np.ascontiguousarray(array)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    (tmp_path / "folder/config.json").write_text('{"model_type": "vqgan", "ch": 32}')
    check(tmp_path / "folder", codes, 2 * pixels - 1)
    export.convert(tmp_path / "folder", tmp_path / "portable")
    export.convert(tmp_path / "portable", tmp_path / "back")
    back = serialization.msgpack_restore((tmp_path / "back/flax_model.msgpack").read_bytes())
    before, after = (dict(_flatten(t)) for t in (tree, back))
    assert set(before) == set(after)
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    shows("dalle_mini_vqgan", "codes", "pixels", "bits")


def linen_maskgit(width, mults, blocks, z, codes):
    """MaskGIT's tokenizer (arXiv:2202.04200, appendix A) in Flax's compact form, which numbers the layers."""
    swish, conv = linen.swish, lambda n, k=3, bias=True: linen.Conv(n, (k, k), use_bias=bias)

    class ResBlock(linen.Module):
        filters: int

        @linen.compact
        def __call__(self, x):
            h = conv(self.filters, bias=False)(swish(linen.GroupNorm()(x)))
            h = conv(self.filters, bias=False)(swish(linen.GroupNorm()(h)))
            return h + (x if x.shape[-1] == self.filters else conv(self.filters, 1, bias=False)(h))

    class Encoder(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = conv(width, bias=False)(x)
            for i, mult in enumerate(mults):
                for _ in range(blocks):
                    x = ResBlock(width * mult)(x)
                x = linen.avg_pool(x, (2, 2), (2, 2)) if i + 1 < len(mults) else x
            for _ in range(blocks):
                x = ResBlock(width * mults[-1])(x)
            return conv(z, 1)(swish(linen.GroupNorm()(x)))

    class Decoder(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = conv(width * mults[-1])(x)
            for _ in range(blocks):
                x = ResBlock(width * mults[-1])(x)
            for i in reversed(range(len(mults))):
                for _ in range(blocks):
                    x = ResBlock(width * mults[i])(x)
                if i:
                    x = conv(width * mults[i])(x.repeat(2, axis=1).repeat(2, axis=2))
            return conv(3)(swish(linen.GroupNorm()(x)))

    class VQVAE(linen.Module):
        def setup(self):
            self.encoder, self.decoder = Encoder(), Decoder()

        def __call__(self, x):
            return self.decoder(self.encoder(x))

    def draw(path, leaf):
        rng = np.random.default_rng(zlib.crc32(str(path).encode()))
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        return (rng.standard_normal(leaf.shape) / np.sqrt(fan_in) + ("scale" in str(path))).astype(np.float32)

    model = VQVAE()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES))["params"]
    params = dict(jax.tree_util.tree_map_with_path(draw, shapes))
    params["quantizer"] = {"codebook": np.random.default_rng(5).standard_normal((codes, z)).astype(np.float32)}
    return model, params


def test_maskgit_as_its_authors_publish_it(tmp_path, shows):
    model, params = linen_maskgit(32, (1, 2, 2), 2, 16, 64)
    path = tmp_path / "tokenizer_imagenet256_checkpoint"  # without an ending, as it is there
    path.write_bytes(serialization.msgpack_serialize({"params": params}))
    networks = {"params": {k: params[k] for k in ("encoder", "decoder")}}
    z = np.asarray(model.apply(networks, (IMAGES + 1) / 2, method=lambda m, x: m.encoder(x)), np.float64)
    codebook = params["quantizer"]["codebook"].astype(np.float64)
    codes = ((z[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)
    pixels = model.apply(networks, params["quantizer"]["codebook"][CODES], method=lambda m, x: m.decoder(x))
    check(path, codes, 2 * np.asarray(pixels) - 1)
    export.convert(path, tmp_path / "portable")
    export.convert(tmp_path / "portable", tmp_path / "back")
    back = serialization.msgpack_restore((tmp_path / "back/flax_model.msgpack").read_bytes())
    before, after = (dict(_flatten(t)) for t in ({"params": params}, back))
    assert set(before) == set(after)
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    # The same network under the names of its PyTorch port.
    export.convert(tmp_path / "portable", tmp_path / "port", to="maskgit_vqgan")
    np.testing.assert_array_equal(
        *(ig.load_tokenizer(p, batch_size=1).encode(IMAGES) for p in (path, tmp_path / "port"))
    )
    shows("maskgit_flax", "codes", "pixels", "bits")


def _flatten(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_maskgit(tmp_path, shows):
    reference = references.randomize(references.MaskGitVQGAN(mults=(1, 1, 2), blocks=2), 0.05)
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        z = reference.encode(UNIT).permute(0, 2, 3, 1).reshape(-1, 16).double()
        codes = torch.cdist(z, reference.quantize.embedding.weight.double()).argmin(-1).numpy()
        pixels = reference.decode(torch.tensor(CODES)).permute(0, 2, 3, 1).numpy()
    check(tmp_path, codes, 2 * pixels - 1)
    export.convert(tmp_path, tmp_path / "portable")
    export.convert(tmp_path / "portable", tmp_path / "back")
    written = load_file(tmp_path / "back/model.safetensors")
    state = reference.state_dict()
    assert set(written) == set(state)
    assert all(written[name].tobytes() == tensor.numpy().tobytes() for name, tensor in state.items())
    shows("maskgit_vqgan", "codes", "pixels", "bits")
