"""The object of a notebook: prompts or pictures in, images with codes, seeds and metadata out."""

import inspect
import io

import numpy as np
import pytest
from PIL import Image

import imagegpt_jax as ig
from imagegpt_jax import images
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation.request import GenerationRequest


@pytest.fixture(scope="module")
def pipe(workdirs):
    return ig.load_pipeline(str(workdirs.decoder))


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8))


def test_prompts_give_images_codes_seeds_and_metadata(pipe):
    results = pipe(["dog", "red heart"], num_images=2, seed=3, top_k=9)
    expected = ig.generate(pipe.decoder, pipe.tokenizer, ["dog", "red heart"], num_images=2, seed=3, top_k=9)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in results.images]), expected)
    decoded = images.to_uint8(pipe.tokenizer.decode(results.codes))
    np.testing.assert_array_equal(decoded, expected)
    assert results.seeds == [(3, 0), (3, 1), (3, 2), (3, 3)]
    assert results.metadata[2]["decoder_hash"] == pipe.decoder.fingerprint()
    again = pipe.run(GenerationRequest.from_json(results.metadata[2]["request"]))
    np.testing.assert_array_equal(again.pixels[0], expected[2])


def test_pictures_tell_the_mode(pipe, photo):
    source = images.read_picture(photo, (16, 16))
    mask = np.zeros((16, 16), bool)
    mask[:8] = True
    for picture in (photo, source):
        results = pipe("dog", images=picture, mask=mask)
        assert results.request.mode == "inpaint"
        np.testing.assert_array_equal(results.pixels[0, 8:], source[8:])
    white_above = Image.fromarray(np.uint8(255) * mask)
    np.testing.assert_array_equal(pipe("dog", images=photo, mask=white_above).pixels, results.pixels)
    for call, mode in [
        (lambda: pipe(photo, strength=0.3), "variations"),
        (lambda: pipe(photo, keep=0.25), "complete"),
        (lambda: pipe("a", images=photo, region=(0, 0, 8, 8)), "edit"),
        (lambda: pipe("a", second_prompt="b", frames=2), "interpolate"),
        (lambda: pipe(), "unconditional"),
    ]:
        assert call().request.mode == mode


def test_jupyter_shows_a_grid_and_reprs_are_short(pipe):
    results = pipe("dog", num_images=2)
    with Image.open(io.BytesIO(results._repr_png_())) as page:
        assert page.size[0] > 2 * 128
    for shown in (results, pipe, pipe.decoder, pipe.tokenizer):
        assert len(repr(shown)) < 500
        assert "\n" not in repr(shown)


def test_arguments_stand_in_signatures_and_a_wrong_one_is_told(pipe):
    for call in (ig.generate, ig.inpaint, ig.style_transfer, type(pipe).__call__):
        parameters = inspect.signature(call).parameters
        assert parameters["temperature"].default is None
        assert parameters["num_images"].default == 1
        assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    with pytest.raises(UserError, match="Did you mean 'temperature'"):
        ig.generate(pipe.decoder, pipe.tokenizer, "dog", temprature=1)
    with pytest.raises(UserError, match="Did you mean 'num_images'"):
        pipe("dog", num_image=2)
