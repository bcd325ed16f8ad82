"""Sampling: the compiled loop against full forward passes, and images that stand alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.data.packing import Layout, TokenSpace
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt import GPT, GPTConfig, Sequence
from imagegpt_jax.sampling import engine, settings
from imagegpt_jax.sampling.batching import run
from imagegpt_jax.sampling.engine import UNKNOWN, prefill, step
from imagegpt_jax.sampling.jobs import caption_job, image_job, until_end
from imagegpt_jax.sampling.settings import Sampling

SPACE = TokenSpace(text_vocab=20, num_classes=3, num_codes=30)
LAYOUT = Layout(space=SPACE, text_length=5, grid=(2, 3))
TEXTS = [[1, 2, 3], [], [4, 5], [6], [7, 8, 9, 10]]


def make(**kwargs) -> GPT:
    """A decoder of random numbers, large enough that its tokens depend on one another."""
    config = GPTConfig(
        **({"vocab_size": SPACE.vocab_size, "width": 32, "depth": 2, "heads": 4, "mlp_width": 48} | kwargs)
    )
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda key: GPT(config, key=key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(treedef, [jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for x in leaves])


GPT_SMALL = make()


def generate_codes(
    gpt, layout, texts, labels=None, sampling=None, seed=0, negative=None, given=None, features=None, **how
):
    sampling, features = sampling or Sampling(), None if features is None else [features]
    job = image_job(layout, [(texts, labels)], sampling, negative=negative, given=given, features=features)
    return run(gpt, job, sampling, seed, **how).tokens


def generate_text(gpt, layout, codes_BN, sampling, **how):
    job = caption_job(layout, codes_BN, sampling)
    return [until_end(layout, ids_T) for ids_T in run(gpt, job, sampling, **how).tokens]


@jax.jit
def forward(gpt: GPT, sequence: Sequence) -> jax.Array:
    return gpt(sequence).logits


def image_logits(gpt, texts, labels, codes_BN, layout=LAYOUT, features=None) -> np.ndarray:
    """Logits of each code from one full forward pass."""
    packed = layout.pack(texts, labels, codes_BN)
    sequence = Sequence.from_batch(packed | (features or {}))
    start, size = layout.image_ids
    return np.asarray(forward(gpt, sequence))[:, layout.text_length : -2, start : start + size]


# ----------------------------------------------------------------------------------------------------------- decoding

VARIANTS = {
    "default": {},
    "learned": {"position": "learned", "max_length": 20, "kv_heads": 2},
    "adaptive": {"conditioning": "adaptive_norm"},
    "any_order": {"target_positions": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_codes_are_the_argmax_of_a_full_pass(name):
    """A picture sampled greedily, packed again: each of its codes is the most likely one there."""
    gpt = make(**VARIANTS[name])
    layout = dataclasses.replace(LAYOUT, target_positions=gpt.config.target_positions)
    labels = [-1, 2, 1, -1, 0]
    codes_BN = generate_codes(gpt, layout, TEXTS, labels, Sampling(temperature=0.0), batch_size=4)
    assert codes_BN.shape == (5, 6)
    assert len({tuple(c) for c in codes_BN}) == 5
    np.testing.assert_array_equal(image_logits(gpt, TEXTS, labels, codes_BN, layout).argmax(-1), codes_BN)


def test_a_long_picture_is_decoded_in_segments():
    """140 codes: two cache segments. Their codes are those of full passes, with and without a look at every step."""
    layout = dataclasses.replace(LAYOUT, grid=(10, 14))
    slots = engine.prompt_slots(GPT_SMALL, Sequence.from_batch(layout.prompt(TEXTS, None)))
    assert engine.cache_segments(slots, 140) == [(slots + 70, 71), (slots + 139, 140)]
    steps = []
    greedy, drawn = Sampling(temperature=0.0), Sampling(cfg_scale=2.0)
    codes_BN = generate_codes(GPT_SMALL, layout, TEXTS, None, greedy, batch_size=5)
    np.testing.assert_array_equal(image_logits(GPT_SMALL, TEXTS, None, codes_BN, layout).argmax(-1), codes_BN)
    whole = generate_codes(GPT_SMALL, layout, TEXTS, None, drawn, batch_size=5)
    seen = generate_codes(GPT_SMALL, layout, TEXTS, None, drawn, batch_size=5, on_step=lambda i, _: steps.append(i))
    np.testing.assert_array_equal(whole, seen)
    assert steps == list(range(1, 141))


@pytest.mark.parametrize("steps", [1, 2, 128, 129, 255, 256, 257, 576, 1024, 4096])
def test_segments_end_with_the_picture(steps):
    parts = engine.cache_segments(7, steps)
    assert parts[-1] == (7 + steps - 1, steps)
    assert all(capacity == 7 + end - 1 for capacity, end in parts)
    ends = [1, *(end for _, end in parts)]
    lengths = np.diff(ends)
    assert len(parts) <= engine.MAX_SEGMENTS
    assert lengths.max() - lengths.min() <= len(parts)
    assert len(parts) == 1 or lengths.min() >= engine.MIN_SEGMENT


def test_guidance_is_the_formula():
    codes_BN = generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, Sampling(temperature=0.0, cfg_scale=3.0), batch_size=4)
    given = image_logits(GPT_SMALL, TEXTS, None, codes_BN)
    without = image_logits(GPT_SMALL, [[]] * 5, None, codes_BN)
    np.testing.assert_array_equal((without + 3.0 * (given - without)).argmax(-1), codes_BN)
    plain = generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, Sampling(temperature=0.0), batch_size=4)
    assert (plain != codes_BN).any()
    # The unconditional prompt is its own guide.
    np.testing.assert_array_equal(plain[1], codes_BN[1])


@pytest.mark.parametrize("conditioning", ["prefix", "adaptive_norm"])
def test_features_and_guidance(conditioning):
    gpt = make(feature_width=12, feature_length=4, conditioning=conditioning)
    features = np.random.default_rng(0).normal(size=(3, 4, 12)).astype(np.float32)
    mask = np.ones((3, 4), bool)
    codes_BN = generate_codes(
        gpt, LAYOUT, [[]] * 3, None, Sampling(temperature=0.0, cfg_scale=2.0), features=(features, mask), batch_size=4
    )
    given, without = (
        image_logits(gpt, [[]] * 3, None, codes_BN, features={"features": features, "feature_mask": m})
        for m in (mask, ~mask)
    )
    np.testing.assert_array_equal((without + 2.0 * (given - without)).argmax(-1), codes_BN)
    assert np.abs(given - without).max() > 0.1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=20, top_p=0.95, cfg_scale=2.0)])
def test_an_image_alone_equals_the_one_in_a_list(sampling):
    texts = TEXTS * 2 + TEXTS[:1]
    together = generate_codes(GPT_SMALL, LAYOUT, texts, None, sampling, 7, batch_size=4)
    for i in (0, 3, 6, 10):
        alone = generate_codes(GPT_SMALL, LAYOUT, [texts[i]], None, sampling, 7, sample_indices=[i], batch_size=4)
        np.testing.assert_array_equal(alone[0], together[i])
    assert (together[0] != together[5]).any(), "the same prompt, another index: other draws"
    other_seed = generate_codes(GPT_SMALL, LAYOUT, texts, None, sampling, 8, batch_size=4)
    assert (together != other_seed).any()


def test_draws_follow_the_model():
    """Codes sampled at temperature 1 have the probabilities that a full pass gives them."""
    codes_BN = generate_codes(GPT_SMALL, LAYOUT, [[1, 2, 3]] * 600, None, Sampling(), 0, batch_size=600)
    logits = image_logits(GPT_SMALL, [[1, 2, 3]], None, codes_BN[:1])[0, 0]
    first = np.bincount(codes_BN[:, 0], minlength=30) / 600
    np.testing.assert_allclose(first, np.exp(logits) / np.exp(logits).sum(), atol=0.06)


def test_changing_settings_or_prompts_compiles_nothing():
    generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, Sampling(temperature=0.9, top_k=5, cfg_scale=2.0), batch_size=4)
    compiled = engine.start._cache_size(), engine.advance._cache_size()
    for texts, sampling in (
        (TEXTS[:1], Sampling(temperature=1.3, top_k=7, top_p=0.5, cfg_scale=4.0)),
        ([[]], Sampling(temperature=0.0, top_k=29, min_p=0.1, cfg_scale=0.0)),
        ([[1, 2, 3, 4, 5]] * 7, Sampling(cfg_scale=3.0, cfg_schedule="power_cosine", cfg_power=2.75)),
        ([[9]], Sampling(top_k=0, cfg_scale=3.0, cfg_schedule="interval", cfg_start=0.2, cfg_end=0.6)),
    ):
        generate_codes(GPT_SMALL, LAYOUT, texts, None, sampling, seed=3, batch_size=4)
    assert (engine.start._cache_size(), engine.advance._cache_size()) == compiled


def test_a_negative_prompt_takes_the_place_of_none():
    sampling = Sampling(temperature=0.0, cfg_scale=2.5)
    codes_BN = generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, sampling, negative=[[11, 12]] * 5, batch_size=4)
    given = image_logits(GPT_SMALL, TEXTS, None, codes_BN)
    away = image_logits(GPT_SMALL, [[11, 12]] * 5, None, codes_BN)
    np.testing.assert_array_equal((away + 2.5 * (given - away)).argmax(-1), codes_BN)
    assert (codes_BN != generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, sampling, batch_size=4)).any()
    with pytest.raises(UserError, match="cfg_scale"):
        generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, negative=[[1]] * 5)


@pytest.mark.parametrize("schedule", ["interval", "linear", "cosine", "power_cosine"])
def test_guidance_follows_its_schedule(schedule):
    how = {"cfg_schedule": schedule, "cfg_power": 2.0, "cfg_start": 0.3, "cfg_end": 0.7}
    codes_BN = generate_codes(
        GPT_SMALL, LAYOUT, TEXTS, None, Sampling(temperature=0.0, cfg_scale=6.0, **how), batch_size=4
    )
    given, none = (image_logits(GPT_SMALL, t, None, codes_BN) for t in (TEXTS, [[]] * 5))
    for i in range(6):
        t = i / 6
        scale = {
            "interval": 6.0 if 0.3 <= t < 0.7 else 1.0,
            "linear": 1 + 5 * t,
            "cosine": 1 + 5 * (1 - np.cos(np.pi * t)) / 2,
            "power_cosine": 1 + 5 * (1 - np.cos(np.pi * t * t)) / 2,
        }[schedule]
        np.testing.assert_array_equal((none + scale * (given - none))[:, i].argmax(-1), codes_BN[:, i])
    constant = generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, Sampling(temperature=0.0, cfg_scale=6.0), batch_size=4)
    assert (constant != codes_BN).any()


def test_given_codes_stay_and_the_others_follow_them():
    rng = np.random.default_rng(0)
    given_BN = np.where(rng.random((5, 6)) < 0.5, rng.integers(0, 30, (5, 6)), UNKNOWN)
    codes_BN = generate_codes(
        GPT_SMALL, LAYOUT, TEXTS, None, Sampling(temperature=0.0, cfg_scale=2.0), given=given_BN, batch_size=4
    )
    kept_BN = given_BN != UNKNOWN
    np.testing.assert_array_equal(codes_BN[kept_BN], given_BN[kept_BN])
    given, none = (image_logits(GPT_SMALL, t, None, codes_BN) for t in (TEXTS, [[]] * 5))
    best_BN = (none + 2.0 * (given - none)).argmax(-1)
    np.testing.assert_array_equal(best_BN[~kept_BN], codes_BN[~kept_BN])
    assert (best_BN[kept_BN] != codes_BN[kept_BN]).any()


def test_prompts_are_mixed_by_their_shares():
    first, second = TEXTS[::2], [[11], [12], [13]]
    shares_B = np.array([0.0, 0.4, 1.0])
    sampling = Sampling(temperature=0.0, cfg_scale=2.0)
    job = image_job(LAYOUT, [(first, None), (second, None)], sampling, mix=np.stack([1 - shares_B, shares_B], axis=1))
    drawn = run(GPT_SMALL, job, sampling, batch_size=4)
    one, two, none = (image_logits(GPT_SMALL, t, None, drawn.tokens) for t in (first, second, [[]] * 3))
    mixed = (1 - shares_B)[:, None, None] * one + shares_B[:, None, None] * two
    np.testing.assert_array_equal((none + 2.0 * (mixed - none)).argmax(-1), drawn.tokens)
    alone = generate_codes(GPT_SMALL, LAYOUT, first[:1], None, sampling, batch_size=4)
    np.testing.assert_array_equal(alone[0], drawn.tokens[0])
    with pytest.raises(UserError, match="sum to 1"):
        image_job(LAYOUT, [(first, None), (second, None)], sampling, mix=np.ones((3, 2)))


def test_likelihood_is_that_of_a_full_pass():
    sampling = Sampling(top_k=5)
    drawn = run(GPT_SMALL, image_job(LAYOUT, [(TEXTS, None)], sampling), sampling, batch_size=4)
    log_probs = jax.nn.log_softmax(image_logits(GPT_SMALL, TEXTS, None, drawn.tokens), axis=-1)
    expected_B = np.take_along_axis(np.asarray(log_probs), drawn.tokens[..., None], axis=-1).sum((1, 2))
    np.testing.assert_allclose(drawn.log_likelihood, expected_B, rtol=1e-5)


def test_nothing_drawn_twice():
    codes_BN = generate_codes(
        GPT_SMALL, LAYOUT, TEXTS, None, Sampling(temperature=0.0, no_repeat_ngram_size=1), batch_size=4
    )
    assert all(len(set(codes_N)) == 6 for codes_N in codes_BN.tolist())
    logits = image_logits(GPT_SMALL, TEXTS, None, codes_BN).copy()
    for b, i in np.ndindex(codes_BN.shape):
        logits[b, i, codes_BN[b, :i]] = -np.inf
    np.testing.assert_array_equal(logits.argmax(-1), codes_BN)
    plain = generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, Sampling(temperature=0.0), batch_size=4)
    assert any(len(set(codes_N)) < 6 for codes_N in plain.tolist())


def test_steps_can_be_watched():
    seen = []
    codes_BN = generate_codes(
        GPT_SMALL, LAYOUT, TEXTS, None, batch_size=4, on_step=lambda i, drawn: seen.append((i, drawn.copy()))
    )
    assert [i for i, _ in seen] == [1, 2, 3, 4, 5, 6] * 2
    for i, drawn in seen[:6]:
        np.testing.assert_array_equal(drawn[:, :i], codes_BN[:4, :i])
        assert not drawn[:, i:].any()
    np.testing.assert_array_equal(codes_BN, generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, batch_size=4))


@pytest.mark.parametrize("guided", [False, True])
def test_another_grid(guided):
    """Positions say where a code stands, so a decoder draws pictures of another shape."""
    wide = dataclasses.replace(LAYOUT, grid=(3, 2))
    sampling = Sampling(temperature=0.0, cfg_scale=2.0 if guided else 1.0)
    codes_BN = generate_codes(GPT_SMALL, wide, TEXTS, None, sampling, batch_size=4)
    given, none = (image_logits(GPT_SMALL, t, None, codes_BN, wide) for t in (TEXTS, [[]] * 5))
    np.testing.assert_array_equal((none + sampling.cfg_scale * (given - none)).argmax(-1), codes_BN)
    assert np.abs(given - image_logits(GPT_SMALL, TEXTS, None, codes_BN)).max() > 0.1, "where codes stand matters"


def test_captions_are_the_argmax_of_a_full_pass_and_end_at_eot():
    space = TokenSpace(text_vocab=3, num_classes=0, num_codes=30)
    layout = Layout(space=space, text_length=5, grid=(2, 3))
    gpt = make(vocab_size=space.vocab_size)
    codes_BN = np.random.default_rng(0).integers(0, 30, (40, 6))
    texts = generate_text(gpt, layout, codes_BN, Sampling(temperature=0.0), batch_size=40)
    assert len({len(t) for t in texts}) > 1, "some end early"
    packed = layout.pack(texts, None, codes_BN, np.ones(40, int))
    logits = np.array(forward(gpt, Sequence.from_batch(packed)))[..., : space.eot + 1]
    logits[..., [space.pad, space.boi, space.eoi]] = -np.inf
    for b, text in enumerate(texts):
        expected = logits[b, layout.num_codes + 1 :].argmax(-1).tolist()
        assert expected[: len(text)] == text
        assert len(text) == layout.text_length or expected[len(text)] == space.eot


def test_a_server_interleaves_requests():
    """Requests admitted into slots at different times give what each gives alone."""
    gpt = GPT_SMALL
    capacity = LAYOUT.prompt_length + 5
    prompts = [Sequence.from_batch(LAYOUT.prompt([t])) for t in ([1, 2, 3], [4])]
    admit = jax.jit(lambda gpt, prompt: prefill(gpt, prompt, capacity, per_row=True))
    advance = jax.jit(step)
    slots = gpt.init_cache(2, capacity, per_row=True)
    base = [p.positions[0, -1] + 1 for p in prompts]
    offsets = LAYOUT.image_offsets()
    codes = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    hidden = [[], []]
    first, cache = admit(gpt, prompts[0])
    hidden[0].append(first[0])
    slots = slots.insert(0, cache)
    for t in range(4):
        # Slot 0 is one token ahead; slot 1 runs garbage until its request comes.
        at = [t, max(t - 1, 0)]
        tokens = np.array([codes[b, at[b]] + SPACE.image_start for b in range(2)])
        positions = np.stack([base[b] + offsets[at[b]] for b in range(2)])
        out, slots = advance(gpt, slots, tokens, positions)
        hidden[0].append(out[0])
        if t == 0:
            first, cache = admit(gpt, prompts[1])
            hidden[1].append(first[0])
            slots = slots.insert(1, cache)
        else:
            hidden[1].append(out[1])
    for b, text in enumerate(([1, 2, 3], [4])):
        full = LAYOUT.pack([text], None, np.concatenate([codes[b], [0, 0]])[None])
        expected = gpt(Sequence.from_batch(full)).hidden[0, LAYOUT.text_length :][: len(hidden[b])]
        np.testing.assert_allclose(np.stack(hidden[b]), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"cfg_scale": -2.0}, "cfg_scale"),
        ({"min_p": 1.5}, "min_p"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"cfg_schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"cfg_power": 0.0}, "cfg_power"),
        ({"cfg_start": 0.6, "cfg_end": 0.5}, "cfg_start"),
        ({"weights": "int4"}, "weights"),
    ],
)
def test_settings_out_of_range(kwargs, word):
    with pytest.raises(UserError, match=word):
        Sampling(**kwargs)


def test_settings_by_their_old_names():
    assert settings.read({"together": 2, "top_k": 3}) == Sampling(tokens_per_step=2, top_k=3)
    assert settings.read({"no_repeat": 2}) == Sampling(no_repeat_ngram_size=2)
    with pytest.raises(UserError, match="Did you mean 'temperature'"):
        settings.read({"temprature": 1.0})


def test_calls_that_do_not_fit():
    codes_BN = np.zeros((1, 6), int)
    with pytest.raises(UserError, match="sample_indices"):
        generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, sample_indices=[1])
    with pytest.raises(UserError, match="given codes"):
        generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, given=np.full((5, 6), 30))
    with pytest.raises(UserError, match="batch_size"):
        generate_codes(GPT_SMALL, LAYOUT, TEXTS, None, batch_size=0)
    with pytest.raises(UserError, match="without guidance"):
        generate_text(GPT_SMALL, LAYOUT, codes_BN, Sampling(cfg_scale=2.0))
    wordless = Layout(space=TokenSpace(text_vocab=0, num_classes=3, num_codes=30), text_length=1, grid=(2, 3))
    with pytest.raises(UserError, match="without text"):
        generate_text(GPT_SMALL, wordless, codes_BN, Sampling())
