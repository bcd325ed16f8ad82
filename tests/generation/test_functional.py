"""The tasks of one decoder, on the workdirs of tiny networks of random numbers."""

import dataclasses
import types

import jax
import numpy as np
import pytest

import imagegpt_jax as ig
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import modes, pipeline
from imagegpt_jax.generation.request import GenerationRequest, ImageInput
from imagegpt_jax.generation.results import GeneratedImages
from imagegpt_jax.sampling.likelihood import log_likelihood
from imagegpt_jax.sampling.settings import UNKNOWN


@pytest.fixture(scope="module")
def gpt(workdirs):
    return ig.load_decoder(workdirs.decoder)


@pytest.fixture(scope="module")
def tok(workdirs):
    return ig.load_tokenizer(workdirs.tokenizer)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)


def made(gpt, tok, request, first=0):
    return GeneratedImages.join(list(pipeline.Pipeline(gpt, tok).prepare(request)(first)))


def inputs(arrays):
    return tuple(ImageInput.of(array) for array in arrays)


def known(tok, pictures, mode, **fields):
    """The request of a mode for pictures, and what stays of them."""
    request = GenerationRequest(mode=mode, images=inputs(pictures), **fields)
    return request, modes.MODES[mode].known(request, tok, pictures)


def test_inpainting_keeps_every_pixel_outside_the_mask_and_every_code_that_it_does_not_touch(gpt, tok, pictures):
    masks = np.zeros((2, 16, 16), bool)
    masks[0, 5:7, 9:11] = True  # rows 5-6 lie in the second row of codes, columns 9-10 in the third column
    masks[1, :, 13:] = True
    out = ig.inpaint(gpt, tok, pictures, masks, ["dog", "cat"], num_images=2, seed=4)
    assert out.shape == (4, 16, 16, 3)
    for i, image in enumerate(out):
        np.testing.assert_array_equal(image[~masks[i // 2]], pictures[i // 2][~masks[i // 2]])
        assert (image[masks[i // 2]] != pictures[i // 2][masks[i // 2]]).any()
    prompts = ("dog", "cat")
    request, kept = known(tok, pictures, "inpaint", mask=inputs(masks), prompts=prompts, num_images=2, seed=4)
    touched = np.array([[5 // 4 * 4 + 9 // 4], [3]], dtype=object)
    assert np.flatnonzero(kept.codes[0] == UNKNOWN).tolist() == touched[0]
    assert np.flatnonzero(kept.codes[1] == UNKNOWN).tolist() == [3, 7, 11, 15]
    results = made(gpt, tok, request)
    np.testing.assert_array_equal(results.pixels, out)
    codes = np.repeat(kept.codes, 2, axis=0)
    np.testing.assert_array_equal(results.codes[codes != UNKNOWN], codes[codes != UNKNOWN])


def test_outpainting_keeps_the_picture_and_makes_it_larger(gpt, tok, pictures):
    out = ig.outpaint(gpt, tok, pictures, (4, 8, 0, 4), "dog", temperature=1.0)
    assert out.shape == (2, 20, 28, 3)
    np.testing.assert_array_equal(out[:, 4:, 4:20], pictures)
    _, kept = known(tok, pictures, "outpaint", margins=(4, 8, 0, 4), prompts=("dog",))
    given = kept.codes.reshape(2, 5, 7)
    np.testing.assert_array_equal(given[:, 1:, 1:5].reshape(2, -1), tok.encode(pictures))
    assert (given == UNKNOWN).sum() == 2 * (35 - 16)


def test_completion_keeps_the_upper_part(gpt, tok, pictures):
    out = ig.complete(gpt, tok, pictures, 0.5, num_images=2)
    assert out.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(out[:, :8], np.repeat(pictures, 2, axis=0)[:, :8])
    assert (out[0, 8:] != out[1, 8:]).any()


def test_variations_and_edits_keep_a_share_of_the_codes(gpt, tok, pictures):
    fields = {"strength": 0.25, "prompts": ("a", "b")}
    request, kept = known(tok, pictures, "variations", seed=3, **fields)
    free = kept.codes == UNKNOWN
    assert free.sum(1).tolist() == [4, 4]
    np.testing.assert_array_equal(np.where(free, 0, kept.codes), np.where(free, 0, tok.encode(pictures)))
    _, other = known(tok, pictures, "variations", seed=4, **fields)
    assert (free != (other.codes == UNKNOWN)).any()
    out = ig.edit(gpt, tok, pictures, ["a", "b"], strength=0.25, seed=3)
    np.testing.assert_array_equal(out, made(gpt, tok, request).pixels)
    np.testing.assert_array_equal(ig.variations(gpt, tok, pictures, 0.25, ["a", "b"], seed=3), out)
    unchanged = ig.variations(gpt, tok, pictures, 0.0)
    np.testing.assert_array_equal(unchanged, ig.variations(gpt, tok, pictures, 0.0, "dog", seed=9))
    region = ig.edit(gpt, tok, pictures, "dog", region=(4, 4, 8, 4))
    inside = np.zeros((16, 16), bool)
    inside[4:12, 4:8] = True
    np.testing.assert_array_equal(region[:, ~inside], pictures[:, ~inside])
    assert (region[:, inside] != pictures[:, inside]).any()


def test_style_transfer_draws_the_same_words_in_another_style(gpt, tok, pictures):
    captions = ["noto emoji of dog", "noto emoji of red heart"]
    out = ig.style_transfer(gpt, tok, pictures, "twemoji", "noto", captions, seed=2)
    expected = ig.generate(gpt, tok, ["twemoji emoji of dog", "twemoji emoji of red heart"], seed=2)
    np.testing.assert_array_equal(out, expected)
    assert modes.restyled(["noto a", "twemoji b", "c"], "twemoji", "noto") == ["twemoji a", "twemoji b", "twemoji c"]
    written = ig.caption(gpt, tok, pictures)
    np.testing.assert_array_equal(
        ig.style_transfer(gpt, tok, pictures, "twemoji", "noto", seed=2),
        ig.generate(gpt, tok, modes.restyled(written, "twemoji", "noto"), seed=2),
    )


def test_interpolation_begins_and_ends_with_its_prompts(gpt, tok):
    series = ig.interpolate(gpt, tok, "dog", "red heart", frames=5, seed=6)
    assert series.shape == (5, 16, 16, 3)
    for at, prompt in ((0, "dog"), (4, "red heart")):
        np.testing.assert_array_equal(series[at], ig.generate(gpt, tok, prompt, seed=6)[0])
    assert len({image.tobytes() for image in series}) > 2


def test_captions_are_those_of_the_picture(gpt, tok, pictures):
    greedy = ig.caption(gpt, tok, pictures)
    assert len(greedy) == 2
    assert greedy == ig.caption(gpt, tok, pictures, seed=5)
    several = ig.caption(gpt, tok, pictures, num_captions=3, seed=1)
    assert len(several) == 6
    assert len(set(several)) > 2
    assert several[:3] == ig.caption(gpt, tok, pictures[:1], num_captions=3, seed=1)


def test_captions_by_beam_search(gpt, tok, pictures):
    assert ig.caption(gpt, tok, pictures, beams=1) == ig.caption(gpt, tok, pictures)  # one beam is greedy
    best = ig.caption(gpt, tok, pictures, beams=4)
    several = ig.caption(gpt, tok, pictures, beams=4, num_captions=3)
    assert several[::3] == best
    assert len(set(several[:3])) == 3


def test_captions_are_ranked_by_likelihood(gpt, tok, pictures):
    captions, layout = ["dog", "red heart", "a"], gpt.setup.layout
    codes = tok.encode(pictures)
    for of in ("image", "text"):
        got = ig.rank_captions(gpt, tok, pictures, captions, of=of)
        assert got.shape == (2, 3)
        for b, c in np.ndindex(2, 3):
            ids = gpt.encode_text(captions[c])
            packed = layout.pack([ids], None, codes[b : b + 1], [int(of == "text")])
            start, size = layout.image_ids if of == "image" else layout.text_ids
            logits = np.asarray(gpt(ig_sequence(packed)).logits)[0, :, start : start + size]
            wanted = packed["kind"][0] == (2 if of == "image" else 1)
            log_probs = jax.nn.log_softmax(logits)[wanted, packed["targets"][0, wanted] - start]
            np.testing.assert_allclose(got[b, c], log_probs.sum(), rtol=1e-5)
            assert wanted.sum() == (16 if of == "image" else len(ids) + 1)


def ig_sequence(packed):
    from imagegpt_jax.models.gpt import Sequence

    return Sequence.from_batch(packed)


def test_the_best_of_several(gpt, tok):
    every = ig.generate(gpt, tok, ["dog", "cat"], num_images=4, seed=1)

    def brightness(gpt, candidates):
        assert [asked.prompt for asked in candidates.asked] == ["dog"] * 4 + ["cat"] * 4
        np.testing.assert_array_equal(candidates.images, every)
        return candidates.images.mean((1, 2, 3))

    kept = ig.generate(gpt, tok, ["dog", "cat"], num_images=2, best_of=4, scorer=brightness, seed=1)
    light = every.mean((1, 2, 3)).reshape(2, 4)
    order = np.argsort(-light, axis=1)[:, :2] + np.array([[0], [4]])
    np.testing.assert_array_equal(kept, every[order.reshape(-1)])
    for scorer in ("likelihood", "caption", "words"):
        request = GenerationRequest(prompts=("dog",), num_images=4, seed=1)
        plain = made(gpt, tok, request)
        best = made(gpt, tok, dataclasses.replace(request, best_of=4, scorer=scorer))
        ids, codes = [gpt.encode_text("dog")] * 4, plain.codes
        expected = {
            "likelihood": plain.log_likelihood,
            "caption": log_likelihood(gpt.gpt, gpt.setup.layout, ids, None, codes, of="text"),
            "words": log_likelihood(gpt.gpt, gpt.setup.layout, ids, None, codes)
            - log_likelihood(gpt.gpt, gpt.setup.layout, [[]] * 4, None, codes),
        }[scorer]
        order = np.argsort(-expected, kind="stable")
        np.testing.assert_allclose([result["score"] for result in best.results], expected[order], rtol=1e-6)
        np.testing.assert_array_equal(best.pixels, plain.pixels[order])
        np.testing.assert_array_equal(best.sample_indices, order)


def test_the_clip_scorer_is_the_cosine_of_embeddings(gpt, tok, pictures, monkeypatch):
    from imagegpt_jax.generation import scorers
    from imagegpt_jax.metrics import networks

    texts = np.array([[1.0, 0, 0], [0, 1, 1]])

    def load(name, path, resize):
        assert (name, path) == ("clip", "folder")
        return types.SimpleNamespace(
            prepare=lambda image: image.astype(np.float32),
            apply=lambda params, images: {"embedding": params * images.mean((1, 2))},
            params=2.0,
        )

    monkeypatch.setattr(networks, "load", load)
    monkeypatch.setattr(networks, "embed_texts", lambda path, prompts: texts[[["a", "b"].index(p) for p in prompts]])
    asked = [scorers.Asked("b", None), scorers.Asked("a", None)]
    candidates = scorers.Candidates(asked, pictures, np.zeros((2, 16)), np.zeros(2), gpt.setup.layout)
    got = scorers.find("clip:folder")(gpt, candidates)
    means = pictures.mean((1, 2))
    cosine = (means * texts[[1, 0]]).sum(1) / np.linalg.norm(means, axis=1) / np.array([np.sqrt(2), 1])
    np.testing.assert_allclose(got, 100 * cosine, rtol=1e-5)


def test_aspect_ratios_and_the_list_that_goes_on(gpt, tok):
    wide = ig.generate(gpt, tok, "dog", grid=(2, 6), num_images=3)
    assert wide.shape == (3, 8, 24, 3)
    request = GenerationRequest(prompts=("dog", "cat"), num_images=6, seed=2)
    every, rest = made(gpt, tok, request), made(gpt, tok, request, first=7)
    np.testing.assert_array_equal(rest.pixels, every.pixels[7:])
    assert rest.seeds == every.seeds[7:] == [(2, i) for i in range(7, 12)]


def test_negative_prompts(gpt, tok):
    plain = ig.generate(gpt, tok, ["dog", "cat"], cfg_scale=4.0)
    away = ig.generate(gpt, tok, ["dog", "cat"], cfg_scale=4.0, negative="cat")
    assert (plain != away).any()
    with pytest.raises(UserError, match="cfg_scale"):
        ig.generate(gpt, tok, "dog", cfg_scale=1.0, negative="cat")


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("uint8", lambda g, t, p: ig.inpaint(g, t, p / 255, np.ones((16, 16), bool))),
        ("multiples of 4", lambda g, t, p: ig.variations(g, t, p[:, :15])),
        ("height and width", lambda g, t, p: ig.inpaint(g, t, p, np.ones((8, 8), bool))),
        ("four multiples of 4", lambda g, t, p: ig.outpaint(g, t, p, (1, 0, 0, 0))),
        ("keep=2", lambda g, t, p: ig.complete(g, t, p, 2)),
        ("strength=-1", lambda g, t, p: ig.variations(g, t, p, -1)),
        ("does not lie within", lambda g, t, p: ig.edit(g, t, p, "a", region=(0, 0, 4, 20))),
        ("3 prompts and 0 classes for 2 pictures", lambda g, t, p: ig.variations(g, t, p, 0.5, ["a"] * 3)),
        ("frames=1", lambda g, t, p: ig.interpolate(g, t, "a", "b", 1)),
        ("without guidance", lambda g, t, p: ig.caption(g, t, p, cfg_scale=2.0)),
        ("leave top_k out", lambda g, t, p: ig.caption(g, t, p, beams=2, top_k=3)),
        ("3 captions of a picture need as many beams", lambda g, t, p: ig.caption(g, t, p, beams=2, num_captions=3)),
        ("of='sound'", lambda g, t, p: ig.rank_captions(g, t, p, ["a"], of="sound")),
        ("best_of=1", lambda g, t, p: ig.generate(g, t, "a", num_images=2, best_of=1)),
        ("Did you mean 'caption'", lambda g, t, p: ig.generate(g, t, "a", best_of=2, scorer="captoin")),
        ("cannot be imported", lambda g, t, p: ig.generate(g, t, "a", best_of=2, scorer="no.such:thing")),
        ("from load_decoder", lambda g, t, p: ig.caption(t, g, p)),
    ],
)
def test_mistakes_are_explained(gpt, tok, pictures, words, call):
    with pytest.raises(UserError, match=words):
        call(gpt, tok, pictures)


def test_learned_positions_end_somewhere(gpt):
    config = types.SimpleNamespace(position="learned", max_length=14)
    stand = types.SimpleNamespace(setup=gpt.setup, gpt=types.SimpleNamespace(config=config))
    assert pipeline.layout_of(stand, None) is gpt.setup.layout
    with pytest.raises(UserError, match="learned 14"):
        pipeline.layout_of(stand, (4, 8))


def test_sampling_settings_reach_the_engine(gpt, tok):
    one = ig.generate(gpt, tok, "dog", no_repeat_ngram_size=1, temperature=0.0)
    codes = tok.encode(one)
    assert (one.shape, codes.shape) == ((1, 16, 16, 3), (1, 16))
    settings = {"temperature": 0.0, "no_repeat_ngram_size": 1}
    assert len(set(made(gpt, tok, GenerationRequest(prompts=("dog",), settings=settings)).codes[0].tolist())) == 16


def test_ways_to_decode_are_settings_of_every_task(gpt, tok, pictures):
    masks = np.zeros((2, 16, 16), bool)
    masks[:, 4:, 6:] = True
    how = {"seed": 4, "temperature": 0.0}
    plain = ig.inpaint(gpt, tok, pictures, masks, ["dog", "cat"], **how)
    np.testing.assert_array_equal(ig.inpaint(gpt, tok, pictures, masks, ["dog", "cat"], speculative=4, **how), plain)
    with pytest.raises(UserError, match="target_positions"):
        ig.inpaint(gpt, tok, pictures, masks, ["dog", "cat"], tokens_per_step=2, **how)
