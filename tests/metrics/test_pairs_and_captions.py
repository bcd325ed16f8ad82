"""Metrics of image pairs, and of images with their captions."""

import json
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image, PngImagePlugin

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import captions, networks, pairs, reconstruction, score, sets, ssim
from imagegpt_jax.models.pretrained import clip


def images(seed, count=2, side=180, noise=12.0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(9 * x + i) * np.cos((5 + i) * y) for i in range(3 * count)]
    clean = 128 + 90 * np.stack(waves).reshape(count, 3, side, side).transpose(0, 2, 3, 1)
    return [(clean + rng.normal(0, s, clean.shape)).clip(0, 255).astype(np.float32) for s in (0, noise)]


@pytest.mark.parametrize("name", ["ssim", "ms_ssim"])
def test_ssim_is_tensorflows(name):
    import tensorflow as tf

    a, b = images(0, side=181)
    reference = tf.image.ssim if name == "ssim" else tf.image.ssim_multiscale
    expected = reference(a, b, 255).numpy()
    assert (expected < 0.95).all()
    np.testing.assert_allclose(jax.jit(getattr(ssim, name))(a, b), expected, rtol=1e-4)


def test_equal_images_are_alike():
    a, _ = images(0, side=176)
    for name in ("ssim", "ms_ssim"):
        np.testing.assert_allclose(jax.jit(getattr(ssim, name))(a, a), 1, rtol=1e-6)
    np.testing.assert_allclose(reconstruction.psnr_B(a, a), 100)


def folder(path, count, side=16, names="{:02d}.png", seed=0):
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3)).astype(np.uint8)).save(path / names.format(i))
    return sets.open_images(path)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"count": 3}, "has 2 images and .* has 3"),
        ({"count": 2, "side": 20}, "are 16 x 16 and those of .* 20 x 20"),
        ({"count": 2, "names": "x{}.png"}, "not hold the same names, 00.png would be compared with x0.png"),
    ],
)
def test_sets_that_are_no_pairs(tmp_path, other, words):
    one = folder(tmp_path / "a", 2)
    with pytest.raises(UserError, match=words):
        pairs.Pairs(one, folder(tmp_path / "b", **other))
    with pytest.raises(UserError, match="ms_ssim needs images of 176 pixels"):
        score.check_side(("psnr", "ms_ssim"), one.size)


# ------------------------------------------------------------------------------------------------------------ captions


def test_captions_beside_images_and_in_them(tmp_path):
    images = folder(tmp_path / "a", 2)
    (tmp_path / "a" / "00.txt").write_text("a red cat\n")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("imagegpt_jax", json.dumps({"prompt": "a blue dog"}))
    Image.fromarray(images.read(1)).save(tmp_path / "a" / "01.png", pnginfo=info)
    assert captions.read(images) == ["a red cat", "a blue dog"]
    (tmp_path / "a" / "00.txt").unlink()
    with pytest.raises(UserError, match="00.png has no caption: put it into 00.txt"):
        captions.read(images)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.txt", "one\ntwo\n"),
        ("c.jsonl", '{"file_name": "01.png", "text": "two"}\n{"file_name": "00.png", "text": "one"}\n'),
        ("c.csv", "caption\none\ntwo\nthree\n"),
        ("c.tsv", "Prompt\tCategory\none\tx\ntwo\ty\n"),
    ],
)
def test_captions_from_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert captions.read(folder(tmp_path / "a", 2), str(tmp_path / name)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.txt", "one\n", "1 captions for 2 images"),
        ("c.jsonl", '{"file_name": "00.png", "text": "one"}', "no caption of 01.png"),
        ("c.jsonl", '{"words": "one"}', "holds no captions"),
        ("c.jsonl", "{", "line 1: not JSON"),
        ("c.txt", "", "holds no captions"),
    ],
)
def test_captions_that_do_not_fit(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        captions.read(folder(tmp_path / "a", 2), str(tmp_path / name))


def test_scores_of_captions_by_definition():
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(6, 8))
    shown = texts * 3 + rng.normal(0, 0.1, texts.shape)
    words = list("abcdef")
    cosine = [t @ s / np.linalg.norm(t) / np.linalg.norm(s) for t, s in zip(texts, shown, strict=True)]
    np.testing.assert_allclose(captions.clip_scores(shown, texts), 100 * np.array(cosine))
    np.testing.assert_array_equal(captions.clip_scores(-shown, texts), 0)
    assert captions.r_precision(shown, texts, words, seed=0) == (1.0, 6)
    wrong = np.roll(shown, 1, axis=0)
    assert captions.r_precision(wrong, texts, words, seed=0)[0] == 0
    assert captions.r_precision(shown, texts, words, seed=0, candidates=3) == (1.0, 3)
    with pytest.raises(UserError, match="2 different captions"):
        captions.r_precision(shown[:2], texts[:2], ["same", "same"], seed=0)


# --------------------------------------------------------------------------------------------------------- the binary


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A folder with random weights of a small CLIP and a tokenizer of ten words."""
    import tokenizers

    root = tmp_path_factory.mktemp("clip")
    rng = np.random.default_rng(0)
    width, hidden, embedding, side, patch, length, vocabulary = 64, 96, 16, 16, 8, 8, 12
    arrays = {"logit_scale": np.float32(1)}
    for tower in ("vision_model", "text_model"):
        for layer in range(2):
            names = clip._NAMES
            for name in (*names.qkv, names.out, *names.mlp):
                shape = {names.mlp[0]: (hidden, width), names.mlp[1]: (width, hidden)}.get(name, (width, width))
                arrays[f"{tower}.encoder.layers.{layer}.{name}.weight"] = rng.normal(0, 0.1, shape)
                arrays[f"{tower}.encoder.layers.{layer}.{name}.bias"] = rng.normal(0, 0.1, shape[0])
            for name in names.norms:
                arrays[f"{tower}.encoder.layers.{layer}.{name}.weight"] = np.ones(width)
                arrays[f"{tower}.encoder.layers.{layer}.{name}.bias"] = np.zeros(width)
    arrays |= {
        "vision_model.embeddings.class_embedding": rng.normal(size=width),
        "vision_model.embeddings.patch_embedding.weight": rng.normal(size=(width, 3, patch, patch)),
        "vision_model.embeddings.position_embedding.weight": rng.normal(size=((side // patch) ** 2 + 1, width)),
        "visual_projection.weight": rng.normal(size=(embedding, width)),
        "text_model.embeddings.token_embedding.weight": rng.normal(size=(vocabulary, width)),
        "text_model.embeddings.position_embedding.weight": rng.normal(size=(length, width)),
        "text_projection.weight": rng.normal(size=(embedding, width)),
    }
    for name in ("vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm"):
        arrays |= {f"{name}.weight": np.ones(width), f"{name}.bias": np.zeros(width)}
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, root / "model.safetensors")
    ids = {
        word: i for i, word in enumerate(["?", "a", "red", "blue", "cat", "dog", "big", "old", "b", "c", "<s>", "</s>"])
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, "?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    tokenizer.save(str(root / "tokenizer.json"))
    return root


def test_scores_of_pairs_and_captions_together(binary, tiny_clip, tmp_path):
    first = folder(tmp_path / "a", 9)
    folder(tmp_path / "b", 9, seed=1)
    words = [
        f"a {size} {colour} {thing}"
        for size in ("big", "old")
        for colour in ("red", "blue")
        for thing in ("cat", "dog")
    ]
    (tmp_path / "words.txt").write_text("\n".join([*words, "a cat"]))
    flags = [
        f"--images={tmp_path / 'a'}",
        f"--reference={tmp_path / 'b'}",
        "--metrics=psnr,ssim,clip_score,r_precision,cmmd",
        f"--feature_weights=clip={tiny_clip}",
        f"--captions={tmp_path / 'words.txt'}",
        f"--output={tmp_path / 'scores.json'}",
    ]
    binary("evaluate", *flags).main()
    scores = json.loads((tmp_path / "scores.json").read_text())
    loaded = clip.CLIP.load(tiny_clip)
    embedded = np.asarray(loaded.embed_images(np.stack([first.read(i) for i in range(9)])))
    texts = networks.embed_texts(str(tiny_clip), [*words, "a cat"])
    expected = captions.clip_scores(embedded, texts)
    assert scores["clip_score"]["value"] == pytest.approx(expected.mean(), rel=1e-4)
    assert scores["clip_score"]["n"] == 9
    assert scores["r_precision"]["candidates"] == 9
    assert scores["cmmd"]["value"] > 0
    second = sets.open_images(tmp_path / "b")
    error = [np.mean((first.read(i).astype(float) - second.read(i)) ** 2) for i in range(9)]
    assert scores["psnr"]["value"] == pytest.approx(np.mean(10 * np.log10(255**2 / np.array(error))), rel=1e-5)
    assert scores["psnr"]["interval"][0] < scores["psnr"]["value"] < scores["psnr"]["interval"][1]
    assert scores["provenance"]["feature_weights"].keys() == {"clip"}


def test_weights_that_are_missing(binary, tmp_path):
    folder(tmp_path / "a", 2)
    given = types.SimpleNamespace(images=f"--images={tmp_path / 'a'}", output=f"--output={tmp_path / 'x.json'}")
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="no weights of clip: give --feature_weights=clip=PATH"):
        binary(
            "evaluate", given.images, given.output, "--metrics=clip_score", f"--captions={tmp_path / 'c.txt'}"
        ).main()
