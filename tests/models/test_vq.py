"""VQModel: LlamaGen's parameter count and module names, grids of codes, remat, and the split before the last layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagegpt_jax.config import to_dataclass
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.quantizers import QuantizerConfig
from imagegpt_jax.models.vq import VQConfig, VQModel

SMALL = VQConfig(
    base_width=8,
    width_mults=(1, 2),
    encoder_blocks=1,
    decoder_blocks=1,
    attention_levels=(1,),
    z_channels=6,
    norm_groups=4,
    quantizer=QuantizerConfig(num_codes=16, code_dim=4),
)


def key(i=0):
    return jax.random.key(i)


def images(*shape):
    return jax.random.uniform(key(7), shape, minval=-1)


def parameter_shapes(config):
    state = nnx.state(jax.eval_shape(lambda k: VQModel(config, key=k), key()))
    flat = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    return {".".join(str(k.key) for k in path): leaf.shape for path, leaf in flat}


def test_defaults_are_llamagen_vq16():
    shapes = parameter_shapes(VQConfig())
    # The published checkpoint's 71,883,403 parameters.
    assert sum(int(np.prod(s)) for s in shapes.values()) == 71_883_403
    assert VQConfig().downsample == 16
    expected = {
        "encoder.conv_in.kernel": (3, 3, 3, 128),
        "encoder.conv_blocks.2.res.0.nin_shortcut.kernel": (1, 1, 128, 256),
        "encoder.conv_blocks.3.downsample.conv.kernel": (3, 3, 256, 256),
        "encoder.conv_blocks.4.attn.1.proj_out.kernel": (1, 1, 512, 512),
        "encoder.mid.1.q.kernel": (1, 1, 512, 512),
        "encoder.conv_out.kernel": (3, 3, 512, 256),
        "quant_conv.kernel": (1, 1, 256, 8),
        "quantize.embedding": (16384, 8),
        "post_quant_conv.kernel": (1, 1, 8, 256),
        "decoder.conv_blocks.0.attn.2.norm.scale": (512,),
        "decoder.conv_blocks.1.res.0.nin_shortcut.kernel": (1, 1, 512, 256),
        "decoder.conv_blocks.3.upsample.conv.bias": (128,),
        "decoder.norm_out.scale": (128,),
        "decoder.conv_out.kernel": (3, 3, 128, 3),
    }
    assert expected.items() <= shapes.items()
    shortcuts = [n for n in shapes if n.endswith("nin_shortcut.kernel")]
    assert [n.split(".")[:3] for n in sorted(shortcuts)] == [
        ["decoder", "conv_blocks", "1"],
        ["decoder", "conv_blocks", "3"],
        ["encoder", "conv_blocks", "2"],
        ["encoder", "conv_blocks", "4"],
    ]
    assert "encoder.conv_blocks.4.downsample.conv.kernel" not in shapes
    assert "decoder.conv_blocks.4.upsample.conv.kernel" not in shapes


def test_codes_of_reconstruct_encode_and_decode_agree():
    model, x = VQModel(SMALL, key=key()), images(2, 8, 12, 3)
    reconstruction, quantized = jax.jit(VQModel.reconstruct)(model, x)
    codes = jax.jit(VQModel.encode_codes)(model, x)
    assert codes.shape == (2, 4, 6)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, quantized.codes)
    decoded = jax.jit(VQModel.decode_codes)(model, codes)
    np.testing.assert_allclose(decoded, reconstruction, atol=1e-5)
    features = jax.jit(VQModel.decode_features)(model, quantized.zq)
    np.testing.assert_allclose(jax.jit(VQModel.to_pixels)(model, features), reconstruction, atol=1e-5)
    assert reconstruction.shape == x.shape


def test_stem_patch_divides_the_resolution():
    config = dataclasses.replace(SMALL, stem_patch=4)
    model = VQModel(config, key=key())
    assert config.downsample == 8
    assert jax.eval_shape(model.encode_codes, images(1, 16, 32, 3)).shape == (1, 2, 4)
    assert jax.eval_shape(model.decode_codes, jnp.zeros((1, 2, 4), jnp.int32)).shape == (1, 16, 32, 3)


def test_every_parameter_trains_and_attention_is_where_asked():
    model, x = VQModel(SMALL, key=key()), images(2, 8, 8, 3)
    graphdef, params = nnx.split(model)

    def loss(params):
        reconstruction, quantized = nnx.merge(graphdef, params).reconstruct(x)
        return jnp.mean(jnp.square(reconstruction - x)) + quantized.loss

    grads = jax.jit(jax.grad(loss))(params)
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(grads))
        if not bool(jnp.any(g != 0))
    ]
    assert dead == []
    assert [len(level.attn) for level in model.encoder.conv_blocks] == [0, 1]
    assert [len(level.attn) for level in model.decoder.conv_blocks] == [1, 0]
    without = VQModel(dataclasses.replace(SMALL, mid_attention=False), key=key())
    assert (len(model.encoder.mid), len(without.encoder.mid)) == (3, 2)


def test_remat_recomputes_and_changes_nothing():
    x = images(1, 8, 8, 3)

    def gradient(remat):
        graphdef, params = nnx.split(VQModel(dataclasses.replace(SMALL, remat=remat), key=key()))

        def loss(params):
            return jnp.mean(jnp.square(nnx.merge(graphdef, params).encode(x)))

        return str(jax.make_jaxpr(jax.grad(loss))(params)), jax.jit(jax.grad(loss))(params)

    (plain_program, plain), (remat_program, rematerialised) = gradient(False), gradient(True)
    assert "remat" not in plain_program
    assert "remat" in remat_program
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rematerialised), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_half_precision_computes_in_bfloat16_and_returns_float32():
    model = VQModel(dataclasses.replace(SMALL, dtype="bfloat16"), key=key())
    x = images(1, 8, 8, 3)
    z = jax.eval_shape(model.encode, x)
    reconstruction, quantized = jax.eval_shape(model.reconstruct, x)
    assert z.dtype == jnp.bfloat16
    assert reconstruction.dtype == quantized.zq.dtype == jnp.float32
    assert model.encoder.conv_in.kernel.dtype == jnp.float32


def test_parameters_name_their_logical_axes():
    kernel = VQModel(SMALL, key=key()).encoder.conv_in.kernel
    assert kernel.axes == (None, None, "conv_in", "conv_out")


def test_config_comes_from_a_mapping():
    config = to_dataclass(VQConfig, {"base_width": 16, "width_mults": [1, 2], "attention_levels": [], "quantizer": {}})
    assert config.widths == (16, 32)
    assert config.quantizer == QuantizerConfig()


def test_mistakes_are_explained():
    model = VQModel(SMALL, key=key())
    with pytest.raises(UserError, match="multiples of 2"):
        model.encode(images(1, 7, 8, 3))
    with pytest.raises(UserError, match="3 channels"):
        model.encode(images(1, 8, 8, 1))
    with pytest.raises(UserError, match=r"attention_levels=\[2\]"):
        dataclasses.replace(SMALL, attention_levels=(2,))
    with pytest.raises(UserError, match="stem_patch=0"):
        dataclasses.replace(SMALL, stem_patch=0)
    with pytest.raises(UserError, match="winograd"):
        dataclasses.replace(SMALL, conv_impl="im2col")
