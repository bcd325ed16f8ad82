"""Several codes a pass: with one it is plain decoding, with several each code follows from what it may see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.data.packing import Layout, TokenSpace
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt import GPT, GPTConfig, Sequence
from imagegpt_jax.sampling import batching, parallel
from imagegpt_jax.sampling.batching import run
from imagegpt_jax.sampling.engine import UNKNOWN
from imagegpt_jax.sampling.jobs import caption_job, image_job
from imagegpt_jax.sampling.settings import Sampling

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
    plain = run(gpt, job, sampling, 3, batch_size=3)
    shape, settings = batching.plan(job, sampling)
    rows = batching.rows_of(job, batching.sample_keys(3, np.arange(3)), np.arange(3)[None])
    tokens, log_likelihood = parallel.decode(batching.place(gpt), rows, settings, shape=shape, tokens_per_step=1)
    np.testing.assert_array_equal(tokens, plain.tokens)
    np.testing.assert_allclose(log_likelihood, plain.log_likelihood, rtol=1e-4)


def logits_after(gpt, codes, order, known, i):
    """Logits of code `order[i]` by a full pass, after the `known` first codes of the order."""
    turned = np.concatenate([order[:known], order[i : i + 1], np.delete(order, [*range(known), i])])
    packed = LAYOUT.pack(TEXTS, None, codes, orders_BN=np.tile(turned, (3, 1)))
    start, size = LAYOUT.image_ids
    hidden = jax.jit(lambda gpt, sequence: gpt(sequence).logits)(gpt, Sequence.from_batch(packed))
    return np.asarray(hidden)[:, LAYOUT.text_length + known, start : start + size]


@pytest.mark.parametrize("tokens_per_step", [2, 4])
def test_each_code_is_the_likeliest_after_those_of_earlier_passes(gpt, tokens_per_step):
    """By full passes: in the order, with the codes of a pass moved so that each in turn is the next one."""
    how = Sampling(temperature=0.0, tokens_per_step=tokens_per_step)
    drawn = run(gpt, image_job(LAYOUT, [(TEXTS, None)], how), how, 7, batch_size=3)
    order = np.random.default_rng(7).permutation(6)
    total = np.zeros(3)
    for i in range(6):
        logits = logits_after(gpt, drawn.tokens, order, i // tokens_per_step * tokens_per_step, i)
        np.testing.assert_array_equal(logits.argmax(-1), drawn.tokens[:, order[i]])
        total += np.asarray(jax.nn.log_softmax(logits)).max(-1)
    np.testing.assert_allclose(drawn.log_likelihood, total, rtol=1e-4)
    assert (drawn.forward_passes == -(-6 // tokens_per_step)).all()


@pytest.mark.parametrize("tokens_per_step", [1, 2])
def test_free_codes_see_every_given_one(gpt, tokens_per_step):
    """Codes 3 and 5 are given: they come first, so that the free ones before them in the picture know of them."""
    how = Sampling(temperature=0.0, tokens_per_step=tokens_per_step)
    given = np.full((3, 6), UNKNOWN)
    given[:, [3, 5]] = [[1, 2], [28, 4], [7, 29]]
    codes = run(gpt, image_job(LAYOUT, [(TEXTS, None)], how, given=given), how, 7, batch_size=3).tokens
    np.testing.assert_array_equal(codes[:, [3, 5]], given[:, [3, 5]])
    places = range(6) if tokens_per_step == 1 else np.random.default_rng(7).permutation(6)
    order = np.array(sorted(places, key=lambda place: place not in (3, 5)))
    for i in range(2, 6):
        logits = logits_after(gpt, codes, order, i // tokens_per_step * tokens_per_step, i)
        np.testing.assert_array_equal(logits.argmax(-1), codes[:, order[i]])


def test_what_is_not_possible(gpt):
    with pytest.raises(UserError, match="tokens_per_step=0"):
        Sampling(tokens_per_step=0)
    how = Sampling(tokens_per_step=2)
    plain = jax.eval_shape(
        lambda key: GPT(dataclasses.replace(gpt.config, target_positions=False), key=key), jax.random.key(0)
    )
    with pytest.raises(UserError, match="target_positions"):
        run(plain, image_job(LAYOUT, [(TEXTS, None)], how), how)
    with pytest.raises(UserError, match="words"):
        run(gpt, caption_job(LAYOUT, np.zeros((1, 6), np.int32), how), how)
