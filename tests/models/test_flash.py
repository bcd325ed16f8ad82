"""Flash attention gives what plain attention gives; the TPU's kernel runs in interpret mode here."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax import config as config_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.models import attention, flash, gpt
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.tasks import decoder
from imagegpt_jax.tasks.decoder.batches import used_length

ROOT = pathlib.Path(__file__).resolve().parents[2]

RNG = np.random.default_rng(0)


def arrays(length, heads, kv_heads, head_dim, batch=2):
    def draw(count):
        return jnp.asarray(RNG.normal(size=(batch, length, count, head_dim)), jnp.float32)

    segments = np.ones((batch, length), np.int32)
    segments[0, 3:7] = 0  # padding within
    segments[1, length // 2 :] = 2
    return draw(heads), draw(kv_heads), draw(kv_heads), jnp.asarray(segments)


def plain(q, k, v, segments):
    return attention.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), attention.causal_mask(segments))


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(128, 2, 2), (130, 4, 2)])  # aligned and not; grouped
def test_splash_attention_equals_plain_attention(length, heads, kv_heads):
    q, k, v, segments = arrays(length, heads, kv_heads, 64)
    weights = jnp.asarray(RNG.normal(size=q.shape), jnp.float32)

    def value(function, q, k, v):
        y = function(q, k, v)
        return (y * weights).sum(), y

    def run(function):
        return jax.jit(jax.value_and_grad(lambda *qkv: value(function, *qkv), argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, y), grads = run(lambda q, k, v: flash.flash_attention(q, k, v, segments, "splash"))
    (_, expected_y), expected_grads = run(lambda q, k, v: plain(q, k, v, segments))
    assert y is not expected_y
    np.testing.assert_allclose(y, expected_y, atol=1e-5)
    for gradient, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-4)


@pytest.mark.parametrize("length", [64, 131, 257])
def test_blocks_of_queries_equal_one(length):
    q, k, v, segments = arrays(length, 4, 2, 16)
    mask = attention.causal_mask(segments)

    def gradients(function):
        def value(q, k, v):
            y = function(q, k, v)
            return jnp.sum(y * jnp.cos(q)), y

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, y), grads = gradients(lambda q, k, v: attention.attend_causally(q, k, v, mask))
    (_, expected_y), expected = gradients(lambda q, k, v: plain(q, k, v, segments))
    np.testing.assert_allclose(y, expected_y, atol=1e-6)
    for gradient, wanted in zip(grads, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=2e-6)
    text = str(jax.make_jaxpr(lambda q, k, v: attention.attend_causally(q, k, v, mask))(q, k, v))
    assert text.count("exp ") == min(4, length // 64)


def naive(q, k, v, mask, rate=0.0, key=None):
    """Attention by its definition, differentiated by JAX."""
    heads, head_dim = q.shape[2:]
    k, v = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("blnh,bnsh->bnls", q, k, preferred_element_type=jnp.float32) / np.sqrt(head_dim)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, attention.MASKED), axis=-1)
    if rate:
        grouped = weights.reshape(*key.shape, -1, *weights.shape[2:])
        weights = attention.layers.dropout(grouped, rate, key).reshape(weights.shape)
    return jnp.einsum("bnls,bnsh->blnh", weights.astype(v.dtype), v)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 0.03)])
def test_the_gradient_of_attention_is_that_of_its_definition(dtype, tolerance, rate):
    q, k, v, segments = arrays(24, 4, 2, 16)
    q, k, v = (x.astype(dtype) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2)))
    mask = attention.causal_mask(segments).at[0, 5].set(False)  # one query sees nothing
    keys = jax.random.split(jax.random.key(0), (2, 2)) if rate else None
    weights = jnp.asarray(RNG.normal(size=q.shape), dtype)

    def run(function):
        def value(*qkv):
            y = function(*qkv)
            return jnp.sum((y * weights).astype(jnp.float32)), y

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, y), grads = run(lambda q, k, v: attention.attend(q, k, v, mask, dropout=rate, key=keys))
    (_, expected_y), expected = run(lambda q, k, v: naive(q, k, v, mask, rate, keys))
    for results, wanted in zip((y, *grads), (expected_y, *expected), strict=True):
        assert results.dtype == wanted.dtype
        wanted = np.asarray(wanted, np.float32)
        np.testing.assert_allclose(np.asarray(results, np.float32), wanted, atol=tolerance * np.abs(wanted).max())
    assert not np.any(grads[0][0, 5])


@pytest.mark.parametrize(("length", "head_dim"), [(24, 16), (25, 12)])  # as it wants them, and filled up
def test_cudnn_gets_the_same_definition(length, head_dim):
    """There is no cuDNN here: its arguments, given to XLA's implementation of the same function, mean the same."""
    q, k, v, segments = arrays(length, 4, 2, head_dim)
    with pytest.MonkeyPatch.context() as patch:
        original = jax.nn.dot_product_attention
        patch.setattr(
            jax.nn, "dot_product_attention", lambda *a, implementation, **kw: original(*a, implementation="xla", **kw)
        )
        y = flash.flash_attention(q, k, v, segments, "cudnn")
    np.testing.assert_allclose(y, plain(q, k, v, segments), atol=1e-5)


@pytest.mark.parametrize("name", ["size=test", "size=B", "size=XL", "size=3B", "size=20B", "recipe=llamagen_t2i_XL"])
def test_the_gradient_of_every_shape_can_be_compiled_for_a_gpu(name, monkeypatch):
    """JAX looks at what cuDNN computes when it traces: without a GPU it can do all but run."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: capability == "8.0")
    monkeypatch.setattr(flash.sharding, "platform", lambda: "gpu")
    config = config_lib.sibling(str(ROOT / "configs" / "x.py"), "decoder.py").get_config(name)
    setup = decoder.setup_abstract(config)
    model, length = setup.model, used_length(setup) + setup.model.feature_length
    implementation = flash.resolve(model)
    assert implementation == ("xla" if name == "size=test" else "cudnn")
    if implementation == "xla":
        return
    shape = 2, length, model.heads, model.head_width
    q = jax.ShapeDtypeStruct(shape, model.dtype)
    k = jax.ShapeDtypeStruct((*shape[:2], model.num_kv_heads, model.head_width), model.dtype)
    segments = jax.ShapeDtypeStruct(shape[:2], jnp.int32)

    def total(q, k, v, segments):
        return flash.flash_attention(q, k, v, segments, implementation).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k, segments)
    assert "fmha" in traced.lower(lowering_platforms=("cuda",)).as_text()


SMALL = {"vocab_size": 8, "width": 16, "depth": 1, "heads": 2, "mlp_width": 8}


def test_auto_follows_the_platform_and_what_it_computes(monkeypatch):
    def resolve(**settings):
        return flash.resolve(GPTConfig(**SMALL, **settings))

    assert resolve() == "xla"  # these tests run on CPU
    assert resolve(attention="cudnn", dtype="bfloat16") == "cudnn"
    monkeypatch.setattr(flash.sharding, "platform", lambda: "tpu")
    assert resolve() == "splash"
    assert resolve(attention_dropout=0.1) == "xla"
    monkeypatch.setattr(flash.sharding, "platform", lambda: "gpu")
    assert resolve() == "xla"  # float32
    assert resolve(dtype="bfloat16") == "cudnn"
    assert resolve(dtype="bfloat16", head_dim=136) == "xla"
    with pytest.raises(UserError, match="dtype is 'float32' with heads of 8: change those"):
        resolve(attention="cudnn")


@pytest.mark.parametrize(("length", "block"), [(128, 128), (1280, 640), (2048, 1024), (1152, 384)])
def test_blocks_divide_the_length(length, block):
    assert flash.block_size(length) == block


def test_a_decoder_with_splash_attention_is_the_same_decoder():
    config = {"vocab_size": 40, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
    ids = jnp.asarray(RNG.integers(0, 40, (2, 9)))
    logits = []
    for implementation in ("xla", "splash"):
        decoder = gpt.GPT(GPTConfig(**config, attention=implementation), key=jax.random.key(0))
        logits.append(jax.jit(lambda g: g.logits(ids))(decoder))
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_dropout_of_attention_weights_needs_plain_attention():
    with pytest.raises(UserError, match="attention='xla'"):
        GPTConfig(vocab_size=8, width=8, depth=1, heads=1, mlp_width=8, attention_dropout=0.1, attention="splash")
