"""The notebook API on the workdirs of tiny networks."""

import importlib.metadata
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import imagegpt_jax as ig
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import functional
from imagegpt_jax.inference.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def tok(workdirs):
    return ig.load_tokenizer(workdirs.tokenizer)


@pytest.fixture(scope="module")
def gpt(workdirs):
    return ig.load_decoder(workdirs.decoder)


@pytest.fixture(scope="module")
def class_gpt(workdirs):
    return ig.load_decoder(workdirs.classes)


def _images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_importing_the_package_starts_nothing():
    code = "import sys, imagegpt_jax; print([m for m in ('jax', 'flax', 'tensorflow', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_api_and_sampling_do_not_import_tensorflow(workdirs):
    code = (
        "import sys, imagegpt_jax as ig, imagegpt_jax.sample;"
        f"tok, gpt = ig.load_tokenizer({str(workdirs.tokenizer)!r}), ig.load_decoder({str(workdirs.decoder)!r});"
        "print([m for m in ('tensorflow', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names():
    assert ig.generate is functional.generate
    assert ig.__version__ == importlib.metadata.version("imagegpt_jax")
    assert set(ig.__all__) <= set(dir(ig))
    assert callable(ig.generate)
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        _ = ig.genrate


# --------------------------------------------------------------------------------------------------------- tokenizer


def test_codes_are_integers_in_raster_order(tok):
    codes_BL = tok.encode(_images(3))
    assert codes_BL.shape == (3, (16 // tok.downsample) ** 2)
    assert codes_BL.dtype == np.int32
    assert codes_BL.min() >= 0
    assert codes_BL.max() < tok.num_codes == tok.config.quantizer.num_codes


def test_nothing_depends_on_the_rest_of_the_batch(tok):
    images = _images(11)
    codes_BL = tok.encode(images)
    assert len(images) > tok.batch_size
    decoded = tok.decode(codes_BL)
    for i in (0, 7, 10):
        np.testing.assert_array_equal(tok.encode(images[i : i + 1])[0], codes_BL[i])
        np.testing.assert_array_equal(tok.decode(codes_BL[i : i + 1])[0], decoded[i])


def test_uint8_float_and_jax_arrays_are_the_same_image(tok):
    images = _images(2)
    floats = images.astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(tok.encode(images), tok.encode(floats))
    np.testing.assert_array_equal(tok.encode(images), tok.encode(jnp.asarray(floats)))


def test_floats_that_may_be_of_either_range_are_told(tok):
    images = _images(2)
    zero_to_one = images.astype(np.float32) / 255
    with pytest.raises(UserError, match=r"value_range=\(0, 1\) or value_range=\(-1, 1\)"):
        tok.encode(zero_to_one)
    np.testing.assert_array_equal(tok.encode(zero_to_one, value_range=(0, 1)), tok.encode(images))
    signed = zero_to_one.astype(np.float32)
    assert (tok.encode(signed, value_range=(-1, 1)) != tok.encode(images)).any()
    with pytest.raises(UserError, match="must be .-1, 1. or .0, 1."):
        tok.encode(zero_to_one, value_range=(0, 255))


def test_pictures_of_pillow_are_the_same_images(tok):
    images = _images(2)
    pictures = [Image.fromarray(image) for image in images]
    np.testing.assert_array_equal(tok.encode(pictures), tok.encode(images))
    np.testing.assert_array_equal(tok.encode(pictures[0]), tok.encode(images[:1]))


def test_decoded_images_are_in_range(tok):
    images = tok.decode(np.arange(tok.num_codes).reshape(-1, 16))
    assert images.shape == (tok.num_codes // 16, 16, 16, 3)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1
    np.testing.assert_array_equal(images[0], tok.decode(jnp.arange(16)[None])[0])
    assert tok.decode(np.zeros((1, 8), int), grid=(2, 4)).shape == (1, 2 * tok.downsample, 4 * tok.downsample, 3)


def test_tokenizer_equals_its_network(tok, workdirs):
    setup, params, _ = read_tokenizer(workdirs.tokenizer)
    model = setup.networks["generator"].module(params)
    images = _images(4).reshape(2, 16, 32, 3).astype(np.float32) / 127.5 - 1
    codes_Bhw = np.asarray(model.encode_codes(jnp.asarray(images)))
    assert codes_Bhw.shape == (2, 4, 8)
    np.testing.assert_array_equal(tok.encode(images), codes_Bhw.reshape(2, 32))
    np.testing.assert_allclose(
        tok.decode(codes_Bhw.reshape(2, 32), (4, 8)), np.clip(model.decode_codes(codes_Bhw), -1, 1), atol=1e-5
    )


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((16, 16, 3), np.uint8), r"\[B, H, W, C\]"),
        (np.zeros((0, 16, 16, 3), np.uint8), "B >= 1"),
        (np.zeros((1, 16, 16, 3), np.int64), "uint8"),
        (np.full((1, 16, 16, 3), 200.0), "127.5"),
        (np.full((1, 16, 16, 3), np.nan), r"\[-1, 1\]"),
        (np.zeros((1, 15, 16, 3), np.uint8), "multiples of 4"),
        (np.zeros((1, 16, 16, 1), np.uint8), "3 channels"),
    ],
)
def test_wrong_images_are_explained(tok, images, words):
    with pytest.raises(UserError, match=words):
        tok.encode(images)


@pytest.mark.parametrize(
    ("codes", "grid", "words"),
    [
        (np.zeros(16, int), None, r"\[B, L\]"),
        (np.zeros((1, 16)), None, "integers"),
        (np.full((1, 16), 64), None, "0 to 63"),
        (np.full((1, 16), -1), None, "0 to 63"),
        (np.zeros((1, 15), int), None, "grid=.rows, columns"),
        (np.zeros((1, 16), int), (3, 5), "3 x 5"),
    ],
)
def test_wrong_codes_are_explained(tok, codes, grid, words):
    with pytest.raises(UserError, match=words):
        tok.decode(codes, grid)


def test_steps_are_different_networks_and_missing_ones_are_listed(tok, workdirs):
    first = ig.load_tokenizer(workdirs.tokenizer, step=1)
    assert (first.step, tok.step) == (1, 2)
    assert first.fingerprint != tok.fingerprint
    assert tok.fingerprint == ig.load_tokenizer(workdirs.tokenizer).fingerprint
    with pytest.raises(UserError, match="step 3: it has 1, 2"):
        ig.load_tokenizer(workdirs.tokenizer, step=3)


def test_wrong_folders_are_explained(workdirs, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        ig.load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        ig.load_decoder(tmp_path)
    with pytest.raises(UserError, match="holds a decoder, not a tokenizer"):
        ig.load_tokenizer(workdirs.decoder)
    with pytest.raises(UserError, match="holds a tokenizer, not a decoder"):
        ig.load_decoder(workdirs.tokenizer)


# ----------------------------------------------------------------------------------------------------------- decoder


def test_decoder_is_a_module_with_logits(gpt):
    assert isinstance(gpt, nnx.Module)
    space = gpt.setup.space
    ids = np.array([[space.boi, space.image_start, space.image_start + 5]])
    logits_BLV = gpt.logits(ids)
    assert logits_BLV.shape == (1, 3, space.vocab_size)
    assert logits_BLV.dtype == jnp.float32
    np.testing.assert_array_equal(logits_BLV, gpt.logits(jnp.asarray(ids)))
    # Causal: what comes later does not change what came before.
    np.testing.assert_allclose(logits_BLV[:, :2], gpt.logits(ids[:, :2]), atol=1e-5)
    graphdef, _ = nnx.split(gpt)
    assert hash(graphdef) == hash(nnx.split(gpt)[0])  # usable as a static argument of jit
    assert len(jax.tree.leaves(nnx.state(gpt))) == len(jax.tree.leaves(nnx.state(gpt.gpt)))


@pytest.mark.parametrize("ids", [[[99999]], [[-1]], [[0.5]], [0]])
def test_wrong_ids_are_explained(gpt, ids):
    with pytest.raises(UserError, match="ids are integers"):
        gpt.logits(np.array(ids))


def test_decoder_finds_its_tokenizer(gpt, class_gpt, tok, workdirs, tmp_path):
    assert gpt.load_tokenizer().fingerprint == tok.fingerprint
    untrained = class_gpt.load_tokenizer()
    assert (untrained.path, untrained.step) == ("", 0)
    assert untrained.fingerprint == class_gpt.load_tokenizer().fingerprint != tok.fingerprint
    with pytest.raises(UserError, match="without a tokenizer: .*--tokenizer=WORKDIR"):
        ig.load_decoder(workdirs.classes, tokenizer="").load_tokenizer()
    moved = ig.load_decoder(workdirs.classes, tokenizer=workdirs.tokenizer)
    assert moved.load_tokenizer().fingerprint == tok.fingerprint


# ---------------------------------------------------------------------------------------------------------- generate


def test_generated_images_depend_on_seed_and_index_alone(gpt, tok):
    prompts = ["noto emoji of dog", "", "красный 😀"]
    images = ig.generate(gpt, tok, prompts, num_images=3, seed=5)
    assert images.shape == (9, 16, 16, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(ig.generate(gpt, tok, prompts[:1], num_images=2, seed=5), images[:2])
    np.testing.assert_array_equal(ig.generate(gpt, tok, prompts, num_images=3, seed=5), images)
    assert not np.array_equal(ig.generate(gpt, tok, prompts, num_images=3, seed=6), images)
    assert not np.array_equal(images[0], images[1])


def test_strange_prompts_work(gpt, tok):
    prompts = ["", " ", "zzzxqy", "😀" * 300, "赤い自転車", "مرحبا", "a\nb", "\u200d"]
    assert len(ig.generate(gpt, tok, prompts)) == len(prompts)
    np.testing.assert_array_equal(ig.generate(gpt, tok, "one"), ig.generate(gpt, tok, ["one"]))


def test_settings_come_from_the_config_unless_given(gpt, tok):
    assert gpt.sampling().cfg_scale == 3.0
    assert gpt.sampling(cfg_scale=None, top_k=5) == gpt.sampling(top_k=5)
    greedy = ig.generate(gpt, tok, ["dog", "dog"], temperature=0)
    np.testing.assert_array_equal(greedy[0], greedy[1])
    np.testing.assert_array_equal(ig.generate(gpt, tok, "dog", top_k=1), greedy[:1])


def test_classes_by_name_and_number(class_gpt):
    tok = class_gpt.load_tokenizer()
    by_name = ig.generate(class_gpt, tok, classes=["food & drink", "Flags"])
    np.testing.assert_array_equal(by_name, ig.generate(class_gpt, tok, classes=[3, "8"]))
    assert len(ig.generate(class_gpt, tok, classes=3, num_images=2)) == 2


def test_wrong_arguments_are_explained(gpt, class_gpt, tok):
    for words, call in [
        ("at least one prompt", lambda: ig.generate(gpt, tok, [])),
        ("at least one prompt", lambda: ig.generate(gpt, tok)),
        ("num_images >= 1", lambda: ig.generate(gpt, tok, "a", num_images=0)),
        ("seed >= 0", lambda: ig.generate(gpt, tok, "a", seed=-1)),
        ("prompts are text", lambda: ig.generate(gpt, tok, [3])),
        ("2 prompts and 1 classes", lambda: ig.generate(gpt, tok, ["a", "b"], classes=[1])),
        ("temperature", lambda: ig.generate(gpt, tok, "a", temperature=-1)),
        ("top_p", lambda: ig.generate(gpt, tok, "a", top_p=0.0)),
        ("from load_decoder", lambda: ig.generate(tok, gpt, "a")),
        ("not trained on classes", lambda: ig.generate(gpt, tok, classes=1)),
        ("trained on classes, not on captions", lambda: ig.generate(class_gpt, tok, "a")),
        ("Did you mean 'Flags'", lambda: ig.generate(class_gpt, tok, classes="flag")),
        ("unknown class 99", lambda: ig.generate(class_gpt, tok, classes=99)),
    ]:
        with pytest.raises(UserError, match=words):
            call()
