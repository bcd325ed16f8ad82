"""Several codes a pass: with one it is plain decoding, with several each code follows from what it may see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.cli import UserError
from imagegpt_jax.data.packing import Layout, TokenSpace
from imagegpt_jax.generate import Sampling, image_job, run
from imagegpt_jax.models.gpt import GPT, GPTConfig, Sequence
from imagegpt_jax.sampling import parallel

SPACE = TokenSpace(text_vocab=20, num_classes=3, num_codes=30)
LAYOUT = Layout(space=SPACE, text_length=3, grid=(2, 3), target_positions=True)
TEXTS = [[1, 2], [], [4, 5, 6]]


@pytest.fixture(scope="module")
def gpt():
    config = GPTConfig(vocab_size=SPACE.vocab_size, width=32, depth=2, heads=4, mlp_width=48, target_positions=True)
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda key: GPT(config, key=key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(treedef, [jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for x in leaves])


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0, cfg_scale=2.0), Sampling(top_k=9)], ids=["greedy", "drawn"]
)
def test_one_at_a_time_is_plain_decoding(gpt, sampling):
    job = image_job(LAYOUT, [(TEXTS, [0, -1, 2])], sampling)
    plain = run(gpt, job, sampling, 3, tile=3).tokens
    np.testing.assert_array_equal(parallel.run(gpt, job, sampling, 3, together=1, tile=3), plain)


@pytest.mark.parametrize("together", [2, 4])
def test_each_code_is_the_likeliest_after_those_of_earlier_passes(gpt, together):
    """By full passes: in the order, with the codes of a pass moved so that each in turn is the next one."""
    how = Sampling(temperature=0.0)
    order = np.array([4, 0, 5, 2, 1, 3])
    codes = parallel.run(gpt, image_job(LAYOUT, [(TEXTS, None)], how), how, together=together, order=order, tile=3)
    start, size = LAYOUT.image_ids
    forward = jax.jit(lambda sequence: gpt(sequence).logits)
    for i in range(6):
        first = i // together * together  # what was known when code i was drawn
        turned = np.concatenate([order[:first], order[i : i + 1], np.delete(order, [*range(first), i])])
        packed = LAYOUT.pack(TEXTS, None, codes, orders_BN=np.tile(turned, (3, 1)))
        logits = np.asarray(forward(Sequence.from_batch(packed)))[:, LAYOUT.text_length + first, start : start + size]
        np.testing.assert_array_equal(logits.argmax(-1), codes[:, order[i]])


def test_what_is_not_possible(gpt):
    how = Sampling()
    job = image_job(LAYOUT, [(TEXTS, None)], how)
    with pytest.raises(UserError, match="together=0"):
        parallel.run(gpt, job, how, together=0)
    plain = jax.eval_shape(
        lambda key: GPT(dataclasses.replace(gpt.config, target_positions=False), key=key), jax.random.key(0)
    )
    with pytest.raises(UserError, match="target_positions"):
        parallel.run(plain, job, how, together=2)
