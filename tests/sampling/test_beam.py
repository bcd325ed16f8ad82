"""Beam search against every sequence there is, and against a beam search in NumPy over full passes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.data.packing import Layout, TokenSpace
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt import GPT, GPTConfig
from imagegpt_jax.sampling import beam
from imagegpt_jax.sampling.batching import run
from imagegpt_jax.sampling.jobs import caption_job, image_job
from imagegpt_jax.sampling.settings import Sampling

SPACE = TokenSpace(text_vocab=4, num_classes=0, num_codes=6)
LAYOUT = Layout(space=SPACE, text_length=3, grid=(2, 2))
CODES = np.random.default_rng(0).integers(0, 6, (3, 4))
HOW = Sampling()


@pytest.fixture(scope="module")
def gpt():
    config = GPTConfig(vocab_size=SPACE.vocab_size, width=32, depth=2, heads=2, mlp_width=48)
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda key: GPT(config, key=key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(treedef, [jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for x in leaves])


@pytest.fixture(scope="module")
def every_caption(gpt):
    """{caption with its end repeated: log-likelihood} of each picture, from the engine with all tokens given."""
    end, words = SPACE.eot, range(4)
    captions = [c for n in range(3) for c in itertools.product(words, repeat=n)]
    captions = [(*c, *[end] * (3 - len(c))) for c in captions] + list(itertools.product(words, repeat=3))
    likelihoods = [{} for _ in CODES]
    for b, codes_N in enumerate(CODES):
        job = caption_job(LAYOUT, np.tile(codes_N, (len(captions), 1)), HOW)
        prefixes = []
        for stop in (1, 2, 3):  # of a caption that ends early only what comes up to its end counts
            part = dataclasses.replace(job, given=np.asarray(captions)[:, :stop], offsets=job.offsets[:stop])
            prefixes.append(run(gpt, part, HOW, batch_size=len(captions)).log_likelihood)
        for c, caption in enumerate(captions):
            length = caption.index(end) + 1 if end in caption else 3
            likelihoods[b][caption] = prefixes[length - 1][c]
    assert len(likelihoods[0]) == len(captions) == 1 + 4 + 16 + 64
    return likelihoods


def test_a_wide_beam_finds_the_best_of_all_captions(gpt, every_caption):
    job = caption_job(LAYOUT, CODES, HOW)
    best = beam.search(gpt, job, HOW, beams=job.size, end=SPACE.eot, batch_size=2)
    for b, scores in enumerate(every_caption):
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        assert tuple(best.tokens[b, 0].tolist()) == ranked[0][0]
        np.testing.assert_allclose(best.log_likelihood[b, 0], ranked[0][1], rtol=1e-4)


def test_every_beam_is_that_of_the_definition(gpt, every_caption):
    """Two beams, extended by hand: the log-likelihood of a beginning is that of all that begins so."""
    end = SPACE.eot
    for b, scores in enumerate(every_caption):
        joint = {c: np.exp(s) for c, s in scores.items()}
        assert sum(joint.values()) == pytest.approx(1, abs=1e-4)

        def mass(start, joint=joint):
            return sum(p for c, p in joint.items() if c[: len(start)] == start)

        beams = [()]
        for _ in range(3):
            longer = [(*s, v) for s in beams for v in (*range(4), end) if end not in s or v == end]
            beams = sorted(longer, key=lambda s: -mass(s))[:2]
        best = beam.search(gpt, caption_job(LAYOUT, CODES, HOW), HOW, beams=2, end=end, batch_size=2)
        assert [tuple(t) for t in best.tokens[b].tolist()] == beams
        np.testing.assert_allclose(best.log_likelihood[b], [np.log(joint[s]) for s in beams], rtol=1e-4)


def test_length_penalty_orders_the_final_beams(gpt, every_caption):
    job = caption_job(LAYOUT, CODES, HOW)
    plain = beam.search(gpt, job, HOW, beams=6, end=SPACE.eot, batch_size=2)
    long = beam.search(gpt, job, HOW, beams=6, end=SPACE.eot, length_penalty=20.0, batch_size=2)
    lengths = [
        np.where((f.tokens == SPACE.eot).any(2), (f.tokens == SPACE.eot).argmax(2) + 1, 3) for f in (plain, long)
    ]
    assert (lengths[1][:, 0] >= lengths[0][:, 0]).all()
    np.testing.assert_array_equal(np.sort(plain.log_likelihood), np.sort(long.log_likelihood))


def test_one_beam_is_greedy_with_guidance(gpt):
    how = Sampling(temperature=0.0, cfg_scale=2.0)
    job = image_job(LAYOUT, [([[1], [2, 3]], None)], how)
    greedy = run(gpt, job, how, batch_size=2)
    best = beam.search(gpt, job, how, beams=1, batch_size=2)
    np.testing.assert_array_equal(best.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(best.log_likelihood[:, 0], greedy.log_likelihood, rtol=1e-4)
    wide = beam.search(gpt, job, how, beams=6, batch_size=2)
    assert (wide.log_likelihood[:, 0] >= best.log_likelihood[:, 0] - 1e-4).all()
    with pytest.raises(UserError, match="beams=7"):
        beam.search(gpt, job, how, beams=7)
