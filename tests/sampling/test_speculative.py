"""Speculative Jacobi decoding: the same distribution, the same greedy tokens, fewer steps."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.data.packing import Layout, TokenSpace
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt import GPT, GPTConfig
from imagegpt_jax.sampling.batching import run
from imagegpt_jax.sampling.engine import UNKNOWN
from imagegpt_jax.sampling.jobs import image_job
from imagegpt_jax.sampling.settings import Sampling

DRAWS = 40_000


def make(codes, scale=0.3, **kwargs):
    space = TokenSpace(text_vocab=6, num_classes=0, num_codes=codes)
    config = GPTConfig(vocab_size=space.vocab_size, width=32, heads=2, mlp_width=48, **({"depth": 2} | kwargs))
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda key: GPT(config, key=key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    gpt = jax.tree.unflatten(treedef, [jnp.asarray(scale * rng.normal(size=x.shape), x.dtype) for x in leaves])
    return gpt, space


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_greedy_tokens_are_identical(position):
    gpt, space = make(20, **({"position": "learned", "max_length": 20} if position == "learned" else {}))
    layout = Layout(space=space, text_length=2, grid=(4, 4))
    how = Sampling(temperature=0.0, cfg_scale=2.0, cfg_schedule="cosine")
    given = np.full((5, 16), UNKNOWN)
    given[2:, 3:9] = np.random.default_rng(0).integers(0, 20, (3, 6))
    for codes in (None, given):
        job = image_job(layout, [([[1], [2, 3], [], [4], [5]], None)], how, given=codes)
        plain = run(gpt, job, how, batch_size=3)
        for window in (2, 7):
            fast = run(gpt, job, dataclasses.replace(how, speculative=window), batch_size=3)
            np.testing.assert_array_equal(fast.tokens, plain.tokens)
            np.testing.assert_allclose(fast.log_likelihood, plain.log_likelihood, rtol=1e-4)
            assert (fast.forward_passes <= 16).all()
        assert fast.forward_passes.mean() < 14
        assert (plain.forward_passes == 16).all()


def test_a_decoder_in_float64_draws_too():
    """As the evaluations of a training in float64 do; plain decoding and guesses."""
    with jax.enable_x64():
        gpt, space = make(20, depth=1, dtype="float64", param_dtype="float64")
        layout = Layout(space=space, text_length=1, grid=(2, 3))
        how = Sampling(temperature=0.0, top_k=5, top_p=0.9)
        job = image_job(layout, [([[1], [2]], None)], how)
        plain, fast = (run(gpt, job, dataclasses.replace(how, speculative=n), batch_size=2) for n in (0, 3))
    np.testing.assert_array_equal(fast.tokens, plain.tokens)
    assert len(np.unique(plain.tokens)) > 2


@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "cfg_scale": 1.7}], ids=str)
def test_the_distribution_is_that_of_plain_decoding(settings):
    """All sequences of three tokens of four, chi-square."""
    gpt, space = make(4, scale=0.2, depth=1)
    layout = Layout(space=space, text_length=1, grid=(1, 3))
    how = Sampling(**settings)
    sequences = np.array(list(itertools.product(range(4), repeat=3)))
    probs = exact(gpt, layout, how, sequences)
    counts = np.zeros(64)
    for seed in range(DRAWS // 20_000):
        job = image_job(layout, [([[1]] * 20_000, None)], how)
        drawn = run(gpt, job, dataclasses.replace(how, speculative=3), seed, batch_size=20_000)
        counts += np.bincount(drawn.tokens @ [16, 4, 1], minlength=64)
    assert (drawn.forward_passes < 3).any()
    if not settings:  # without filters a sequence's log-likelihood is that of its draws
        expected = np.log(probs[drawn.tokens @ [16, 4, 1]])
        np.testing.assert_allclose(drawn.log_likelihood, expected, rtol=1e-4, atol=1e-4)
    seen = probs > 0
    assert counts[~seen].sum() == 0
    expected = DRAWS * probs[seen]
    statistic, freedom = (np.square(counts[seen] - expected) / expected).sum(), seen.sum() - 1
    # The upper 0.0005 quantile (Wilson and Hilferty 1931).
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.29 * np.sqrt(2 / (9 * freedom))) ** 3


def exact(gpt, layout, how, sequences):
    """Probability of each sequence under filters and guidance, from full passes in NumPy."""
    from imagegpt_jax.models.gpt import Sequence

    def logits(texts):
        packed = layout.pack(texts, None, sequences)
        start, size = layout.image_ids
        out = gpt(Sequence.from_batch(packed)).logits[:, layout.text_length : -2, start : start + size]
        return np.asarray(out, np.float64)

    none = logits([[]] * len(sequences))
    mixed = none + how.cfg_scale * (logits([[1]] * len(sequences)) - none)
    if how.top_k:
        least = np.sort(mixed, axis=-1)[..., [-how.top_k]]
        mixed = np.where(mixed >= least, mixed, -np.inf)
    probs = np.exp(mixed - mixed.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    return np.take_along_axis(probs, sequences[..., None], -1)[..., 0].prod(1)


def test_a_sample_depends_on_its_seed_and_index_alone():
    gpt, space = make(20)
    layout = Layout(space=space, text_length=2, grid=(2, 3))
    how = Sampling(top_p=0.9, speculative=4)
    together = run(gpt, image_job(layout, [([[1], [2], [3], [4]], None)], how), how, 5, batch_size=2)
    job = image_job(layout, [([[3]], None)], how)
    alone = run(gpt, job, how, 5, batch_size=2, sample_indices=[2])
    np.testing.assert_array_equal(together.tokens[2], alone.tokens[0])
    with pytest.raises(UserError, match="on_step"):
        run(gpt, job, how, on_step=print)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"speculative": 1}, "speculative=1"),
        ({"speculative": 4, "no_repeat_ngram_size": 1}, "no_repeat_ngram_size=1"),
        ({"speculative": 4, "tokens_per_step": 2}, "exclude"),
    ],
)
def test_settings_that_exclude_one_another(settings, words):
    with pytest.raises(UserError, match=words):
        Sampling(**settings)
