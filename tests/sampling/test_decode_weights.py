"""Weights laid out for decoding: the same numbers in float32, near ones in bfloat16 and int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.data.packing import Layout, TokenSpace
from imagegpt_jax.models import layers
from imagegpt_jax.models.gpt import GPT, GPTConfig
from imagegpt_jax.sampling.batching import run
from imagegpt_jax.sampling.decode_weights import ColumnLinear, Int8Linear, prepare
from imagegpt_jax.sampling.jobs import image_job
from imagegpt_jax.sampling.settings import Sampling

SPACE = TokenSpace(text_vocab=20, num_classes=0, num_codes=30)
LAYOUT = Layout(space=SPACE, text_length=3, grid=(2, 3))


def linear(bias=False):
    layer = layers.Linear(48, 80, key=jax.random.key(0), axes=("embed", "mlp"), bias=bias)
    return layer


@pytest.mark.parametrize("kind", [ColumnLinear, Int8Linear])
def test_a_map_is_the_map_it_was_made_of(kind):
    layer, x = linear(bias=True), jax.random.normal(jax.random.key(1), (2, 5, 48))
    layer.bias[...] = jax.random.normal(jax.random.key(2), (80,))
    made = kind(layer, jnp.float32)
    expected = layer(x)
    if kind is Int8Linear:
        weight = np.asarray(layer.weight[...], np.float64)
        scale = np.abs(weight).max(0) / 127
        rounded = np.round(weight / scale)
        np.testing.assert_array_equal(made.weight[...], rounded)
        error = np.abs(made(x) - expected).max()
        assert 1e-4 < error < 0.05
        # What is left are the roundings of W: x itself is kept to 15 bits.
        expected = np.asarray(x, np.float64) @ (rounded * scale) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(made(x), expected, atol=5e-4 if kind is Int8Linear else 1e-5)


def test_axes_follow_the_dimensions():
    layer = linear()
    assert ColumnLinear(layer, jnp.float32).weight.axes == ("mlp", "embed")
    assert (Int8Linear(layer, jnp.float32).weight.axes, Int8Linear(layer, jnp.float32).scale.axes) == (
        ("embed", "mlp"),
        ("mlp",),
    )


def test_likelihoods_in_every_precision():
    config = GPTConfig(vocab_size=SPACE.vocab_size, width=64, depth=2, heads=4, mlp_width=96, bias=True, norm="layer")
    gpt = jax.jit(lambda key: jax.tree.map(lambda x: 2 * x, GPT(config, key=key)))(jax.random.key(0))
    before = [np.asarray(x) for x in jax.tree.leaves(gpt)]
    codes_BN = np.random.default_rng(0).integers(0, 30, (8, 6))
    likelihoods = {}
    for weights in ("float32", "bfloat16", "int8"):
        how = Sampling(weights=weights)
        job = image_job(LAYOUT, [([[i] for i in range(8)], None)], how, given=codes_BN)
        likelihoods[weights] = run(gpt, job, how, batch_size=8).log_likelihood / 6
    reference = jax.nn.log_softmax(gpt_logits(gpt, LAYOUT.pack([[i] for i in range(8)], None, codes_BN)), axis=-1)
    expected = np.take_along_axis(np.asarray(reference), codes_BN[..., None], -1)[..., 0].mean(1)
    np.testing.assert_allclose(likelihoods["float32"], expected, atol=1e-5)
    for weights, most in (("bfloat16", 0.05), ("int8", 0.05)):
        difference = np.abs(likelihoods[weights] - expected).max()
        assert 1e-5 < difference < most, (weights, difference)
    for was, now in zip(before, jax.tree.leaves(gpt), strict=True):
        np.testing.assert_array_equal(was, now)  # the decoder itself is not touched


def gpt_logits(gpt, packed):
    from imagegpt_jax.models.gpt import Sequence

    start, size = LAYOUT.image_ids
    return gpt(Sequence.from_batch(packed)).logits[:, 3:-2, start : start + size]


def test_bytes_of_each_precision():
    config = GPTConfig(vocab_size=SPACE.vocab_size, width=64, depth=2, heads=4, mlp_width=96)
    gpt = jax.eval_shape(lambda key: GPT(config, key=key), jax.random.key(0))

    def size(weights):
        made = jax.eval_shape(lambda gpt: prepare(gpt, weights), gpt)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.blocks))

    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    norms, columns = 2 * 2 * 64 * 4, 2 * (4 * 64 + 2 * 96 + 64) * 4
    assert size("float32") == 4 * matrices + norms
    assert size("bfloat16") == 2 * matrices + norms
    assert size("int8") == matrices + columns + norms
