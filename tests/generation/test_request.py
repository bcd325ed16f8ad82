"""Requests as data: to JSON and back, strictly, and the requests of metadata that older versions wrote."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import arguments, metadata, modes
from imagegpt_jax.generation.postprocess import Postprocessing
from imagegpt_jax.generation.request import GenerationRequest, ImageInput
from imagegpt_jax.sampling.settings import Sampling

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
FULL = GenerationRequest(
    mode="inpaint",
    prompts=("a", ""),
    classes=(3, None),
    negative=("cat",),
    images=(ImageInput("a.png", "0123456789abcdef"), ImageInput.of(PIXELS)),
    mask=(ImageInput.of(PIXELS[..., 0] > 99),),
    settings={"temperature": 0.5, "top_k": 3, "cfg_schedule": "linear"},
    seed=4,
    num_images=2,
    sample_indices=(4, 5, 6, 7),
    postprocess=Postprocessing(resize=(24, 40), contrast=1.3, withhold=True),
)


def test_every_request_survives_json():
    interpolation = GenerationRequest(
        mode="interpolate", prompts=("a",), second_prompt="b", shares=modes.shares_of(4), best_of=3, scorer="words"
    )
    for request in (FULL, GenerationRequest(), interpolation, GenerationRequest(margins=(4, 0, 0, 8), grid=(2, 6))):
        body = json.loads(json.dumps(request.to_json()))
        again = GenerationRequest.from_json(body)
        assert again == request
        assert again.to_json() == body
        for ours, theirs in zip(request.images + request.mask, again.images + again.mask, strict=True):
            np.testing.assert_array_equal(ours.pixels, theirs.pixels)
    assert GenerationRequest().to_json() == {"version": 1, "mode": "text_to_image"}
    assert GenerationRequest.from_json(FULL.to_json()) != dataclasses.replace(FULL, mask=(ImageInput.of(PIXELS),))
    assert [np.float32(share) for share in interpolation.shares] == np.linspace(0, 1, 4, dtype=np.float32).tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "no request of version 1"),
        ({"promts": ["a"]}, "Did you mean 'prompts'"),
        ({"prompts": "a"}, "prompts='a' must be"),
        ({"prompts": [1]}, "prompts=1 must be str"),
        ({"seed": "1"}, "seed='1' must be int"),
        ({"seed": True}, "seed=True must be int"),
        ({"grid": [2]}, r"grid=\[2\] must be"),
        ({"settings": {"top_k": [1]}}, r"settings.top_k=\[1\] must be"),
        ({"postprocess": {"contrst": 1}}, "Did you mean 'contrast'"),
        ({"images": [{"file": "a.png"}]}, "images has no field 'file'"),
        ({"images": [{"png": "####"}]}, "no PNG in base64"),
    ],
)
def test_wrong_json_is_one_sentence(change, words):
    with pytest.raises(UserError, match=words):
        GenerationRequest.from_json(FULL.to_json() | change)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "inpant"}, "Did you mean 'inpaint'"),
        ({"mode": "inpaint"}, "inpaint needs images"),
        ({"prompts": ("a",), "strength": 0.5}, "text_to_image does not use strength"),
        ({"mode": "interpolate", "prompts": ("a", "b"), "second_prompt": "c", "shares": (0.0,)}, "needs one prompt"),
        ({"mode": "unconditional", "num_images": 0}, "num_images >= 1"),
    ],
)
def test_a_mode_says_what_it_needs(fields, words):
    with pytest.raises(UserError, match=words):
        modes.check(GenerationRequest(**fields))


def test_a_file_must_still_be_the_same(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    request = GenerationRequest(mode="variations", images=(ImageInput(str(path)),)).hashed()
    assert request.hashed() == request
    np.testing.assert_array_equal(request.images[0].load((8, 8)), PIXELS)
    Image.fromarray(PIXELS[::-1]).save(path)
    with pytest.raises(UserError, match="contents have changed"):
        request.hashed()


def test_each_image_has_a_request_of_its_own():
    request = GenerationRequest(prompts=("a", ""), classes=(None, None), negative=("n",), num_images=2, best_of=4)
    assert request.indices() == [0, 1, 2, 3]
    assert request.single(0, 7) == GenerationRequest(prompts=("a",), negative=("n",), sample_indices=(7,))
    assert request.single(1, 2).mode == "unconditional"
    assert FULL.single(1, 6).images == FULL.images[1:]
    assert FULL.single(1, 6).prompts == ()
    series = GenerationRequest(
        mode="interpolate", prompts=("a",), second_prompt="b", shares=(0.0, 0.5, 1.0), num_images=2
    )
    assert series.indices() == [0, 1] * 3
    assert series.single(1, 1).shares == (0.5,)


SAMPLER = {"temperature": 1.0, "top_k": 7, "no_repeat": 2, "together": 1, "cfg_scale": 3.0}


@pytest.mark.parametrize(
    ("flags", "finish", "expected"),
    [
        (
            {"prompt": ["dog"], "negative": "cat", "grid": ["2", "6"]},
            {"resize": ["40"], "upscaler": "numpy:flipud"},
            {
                "prompts": ("dog",),
                "negative": ("cat",),
                "grid": (2, 6),
                "postprocess": Postprocessing(resize=(40,), upscaler="numpy:flipud"),
            },
        ),
        ({"prompt": [], "class": ["flags"]}, {}, {"mode": "class_conditional", "classes": ("flags",)}),
        ({"prompt": []}, {}, {"mode": "unconditional"}),
        (
            {"prompt": ["dog"], "mask": "m.png", "inpaint": ["c.png"], "files": {"c.png": "aa", "m.png": "bb"}},
            {},
            {
                "mode": "inpaint",
                "prompts": ("dog",),
                "images": (ImageInput("c.png", "aa"),),
                "mask": (ImageInput("m.png", "bb"),),
            },
        ),
        (
            {"prompt": [], "margins": ["4", "0", "0", "8"], "outpaint": ["c.png"], "files": {"c.png": "aa"}},
            {},
            {"mode": "outpaint", "margins": (4, 0, 0, 8), "images": (ImageInput("c.png", "aa"),)},
        ),
        (
            {"prompt": ["x"], "style": "a", "source_style": "b", "style_transfer": ["c.png"], "strength": 0.8},
            {},
            {
                "mode": "style_transfer",
                "prompts": ("x",),
                "style": "a",
                "source_style": "b",
                "strength": 0.8,
                "images": (ImageInput("c.png"),),
            },
        ),
        (
            {"prompt": ["dog"], "frames": 5, "interpolate": "heart", "frame": 1},
            {},
            {"mode": "interpolate", "prompts": ("dog",), "second_prompt": "heart", "shares": (0.25,)},
        ),
    ],
)
def test_metadata_of_before(flags, finish, expected):
    about = {"request": flags, "draw": 3, "seed": 5, "sampler": SAMPLER, "finish": finish}
    settings = {"temperature": 1.0, "top_k": 7, "no_repeat_ngram_size": 2, "tokens_per_step": 1, "cfg_scale": 3.0}
    request = metadata.of_flags(about)
    assert request == GenerationRequest(**{"settings": settings, "seed": 5, "sample_indices": (3,)} | expected)
    modes.check(request)


def test_the_options_of_calls_are_the_fields_of_requests_and_the_settings():
    options = set(arguments.Options.__annotations__) | set(arguments.SamplingOptions.__annotations__)
    fields = {field.name for field in dataclasses.fields(GenerationRequest)}
    settings = {field.name for field in dataclasses.fields(Sampling)}
    assert settings < options <= settings | fields | set(arguments.RUN)
