"""FLOPs by formula against FLOPs counted in a trace of the very network."""

import functools

import jax
import jax.numpy as jnp
import pytest

from imagegpt_jax import flops
from imagegpt_jax.config import sibling
from imagegpt_jax.models import gpt
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.tasks import tokenizer

BASE = {"vocab_size": 64, "width": 32, "depth": 3, "heads": 4, "mlp_width": 48}
BATCH, LENGTH = 2, 16


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 2, "mlp": "gelu"}, {"scan": False, "head_dim": 16}, {"target_positions": True},
     {"conditioning": "adaptive_norm"}],
)  # fmt: skip
def test_a_decoder_s_formula_is_what_its_trace_multiplies(changes):
    config = GPTConfig(**{**BASE, **changes})
    module = jax.eval_shape(lambda key: gpt.GPT(config, key=key), jax.random.key(0))
    sequence = jax.eval_shape(gpt.plain_sequence, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32))
    extra = {}
    if config.target_positions:
        extra["target_positions"] = sequence.positions
    if config.conditioning == "adaptive_norm":
        extra["condition"] = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    sequence = gpt.Sequence(sequence.tokens, sequence.positions, sequence.segments, **extra)

    def forward(module, sequence):
        return module(sequence).logits

    masked = BATCH * config.depth * 2 * LENGTH**2 * config.heads * config.head_width  # multiplied, and thrown away
    expected = flops.decoder_forward(config, BATCH, LENGTH, [(64, LENGTH)]) + masked
    assert flops.traced(forward, module, sequence) == expected
    gradient = jax.grad(lambda module, sequence: forward(module, sequence).sum())
    assert flops.traced(gradient, module, sequence) <= 3 * expected  # nothing to do for inputs that are no parameters


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
