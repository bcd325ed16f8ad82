"""FLOPs by formula against FLOPs counted in a trace of the very network."""

import functools

import jax
import jax.numpy as jnp
import pytest

from imagegpt_jax.config import sibling
from imagegpt_jax.models import flops, gpt
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.sampling.engine import step as add_token
from imagegpt_jax.tasks import decoder, tokenizer

BASE = {"vocab_size": 64, "width": 32, "depth": 3, "heads": 4, "mlp_width": 48}
BATCH, LENGTH = 2, 16

FEATURES = {"feature_width": 24, "feature_length": 6}


def network(changes, length):
    """(config, abstract decoder, abstract sequences with all that the config asks for)."""
    config = GPTConfig(**{**BASE, **changes})
    module = jax.eval_shape(lambda key: gpt.GPT(config, key=key), jax.random.key(0))
    sequence = jax.eval_shape(gpt.plain_sequence, jax.ShapeDtypeStruct((BATCH, length), jnp.int32))
    extra = {}
    if config.target_positions:
        extra["target_positions"] = sequence.positions
    if config.feature_width:
        extra["features"] = jax.ShapeDtypeStruct((BATCH, config.feature_length, config.feature_width), jnp.float32)
        extra["feature_mask"] = jax.ShapeDtypeStruct((BATCH, config.feature_length), bool)
    elif config.conditioning == "adaptive_norm":
        extra["condition"] = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    return config, module, gpt.Sequence(sequence.tokens, sequence.positions, sequence.segments, **extra)


def prefix(config):
    return config.feature_length - config.feature_begins if config.conditioning == "prefix" else 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 2, "mlp": "gelu"}, {"scan": False, "head_dim": 16}, {"target_positions": True},
     {"conditioning": "adaptive_norm"}, FEATURES, {**FEATURES, "feature_begins": True},
     {**FEATURES, "conditioning": "adaptive_norm"}],
)  # fmt: skip
def test_a_decoder_s_formula_is_what_its_trace_multiplies(changes):
    config, module, sequence = network(changes, LENGTH)

    def forward(module, sequence):
        return module(sequence).logits

    length = LENGTH + prefix(config)
    masked = BATCH * config.depth * 2 * length**2 * config.heads * config.head_width  # multiplied, and thrown away
    expected = flops.decoder_forward(config, BATCH, LENGTH, [(64, LENGTH)]) + masked
    assert flops.traced(forward, module, sequence) == expected
    gradient = jax.grad(lambda module, sequence: forward(module, sequence).sum())
    assert flops.traced(gradient, module, sequence) <= 3 * expected  # nothing to do for inputs that are no parameters


@pytest.mark.parametrize(
    "changes",
    [{}, {"target_positions": True}, FEATURES, {**FEATURES, "feature_begins": True},
     {**FEATURES, "conditioning": "adaptive_norm"}],
)  # fmt: skip
def test_a_step_of_sampling_does_not_pay_for_the_prefix_again(changes):
    config, module, prompt = network(changes, 1)
    slots = 20
    cache = jax.eval_shape(lambda module: module.init_cache(BATCH, slots), module)
    ids_B, positions_B3 = jnp.zeros(BATCH, jnp.int32), jnp.zeros((BATCH, 3), jnp.int32)
    targets_B3 = positions_B3 if config.target_positions else None

    def step(module, cache, prompt):  # its trace has the scores of the whole vocabulary, used or not
        return add_token(module, cache, ids_B, positions_B3, target_positions_R3=targets_B3, prompt=prompt)

    masked = BATCH * config.depth * 2 * config.heads * config.head_width  # half of a token's product with itself
    expected = flops.decoder_forward(config, BATCH, 1, [(64, 1)], slots - 1) + masked
    assert flops.traced(step, module, cache, prompt) == expected


def test_convolutions_are_counted_by_their_window():
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)
    forward = 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert flops.traced(conv, x, kernel) == forward
    assert flops.traced(jax.grad(conv, (0, 1)), x, kernel) == 3 * forward


def test_a_tokenizer_s_step_grows_with_the_batch_and_the_discriminator():
    config = sibling("configs/x.py", "tokenizer.py").get_config("size=test")
    setup = tokenizer.setup_abstract(config)
    count = functools.partial(tokenizer.step_flops, setup)
    one, two = (tokenizer.abstract_batch(setup, b) for b in (1, 2))
    assert count("reconstruction", two) == 2 * count("reconstruction", one) > 0
    assert count("adversarial", one) > count("reconstruction", one)


def test_a_decoder_s_step_counts_the_images_that_it_encodes():
    """The model of `test`: a convolution in, three blocks of two and one out, 16 channels wide; codes of 8 of 64."""
    config = sibling("configs/x.py", "decoder.py").get_config("size=test")
    images, tokens = decoder.setup(config), decoder.setup_abstract(config)
    batch = decoder.abstract_batch(tokens, 5)
    encoding = 2 * 16 * (9 * (48 * 16 + 7 * 16 * 16) + 16 * 8 + 8 * 64)
    photos = batch | {"image": jax.ShapeDtypeStruct((5, 16, 16, 3), jnp.float32)}
    results = decoder.step_flops(images, "train", photos) - decoder.step_flops(tokens, "train", batch)
    assert results == 5 * encoding
