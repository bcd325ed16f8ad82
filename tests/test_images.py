import io

import numpy as np
import pytest
from PIL import Image

from imagegpt_jax import images


def _noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_to_uint8_rounds_and_clips():
    values = np.array([-2.0, -1.0, 0.0, 1.0, 3.0, -1 + 2 / 255, -1 + 0.9 / 255], np.float32)
    np.testing.assert_array_equal(images.to_uint8(values), [0, 0, 128, 255, 255, 1, 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_pixels_and_metadata(channels):
    image = _noise(8, 9, channels)
    metadata = {"prompt": "ein rotes Fahrrad ❤️ 自転車\n", "seed": 7, "sampler": {"top_p": 0.9}, "step": 10}
    data = images.png_bytes(image, metadata)
    with Image.open(io.BytesIO(data)) as png:
        np.testing.assert_array_equal(np.asarray(png).reshape(image.shape), image)
        assert png.info["prompt"] == metadata["prompt"]
        assert png.info["seed"] == "7"
    assert images.read_metadata(data) == metadata


def test_metadata_of_a_foreign_png_is_empty():
    out = io.BytesIO()
    Image.new("RGB", (2, 2)).save(out, format="PNG")
    assert images.read_metadata(out.getvalue()) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red bicycle", "a red bicycle"),
        ("  a \n b\t c ", "a b c"),
        ("café São Paulo", "cafe Sao Paulo"),
        ("красный велосипед", "[Cyrillic] [Cyrillic]"),
        ("heart ❤️ now", "heart [heavy black heart] now"),
        ("自転車 bike", "[CJK] bike"),
        ("😀😀", "[grinning face]"),
        ("\u200d\ufe0f", ""),
        ("", ""),
        ("\ue000", "[U+E000]"),
    ],
)
def test_every_text_becomes_drawable(text, expected):
    assert images.drawable(text) == expected
    assert all(images._has_glyph(c) for c in images.drawable(text))


def test_missing_glyphs_are_recognised():
    assert images._has_glyph("a")
    assert images._has_glyph("…")
    assert not images._has_glyph("中")


@pytest.mark.parametrize("text", ["one two three four five six seven eight nine ten " * 4, "x" * 400, "a"])
def test_wrapped_lines_fit(text):
    lines = images.wrap(text, 120, lines=3)
    assert 1 <= len(lines) <= 3
    assert all(images._font().getlength(line) <= 120 for line in lines)
    assert (lines[-1].endswith("…")) == (len(text) > 30)


def test_wrapping_loses_nothing_that_fits():
    text = "noto emoji of red heart"
    assert " ".join(images.wrap(text, 90, lines=5)) == text


def test_grid_shows_every_picture_enlarged_and_captioned():
    pictures = _noise(6, 4, 32, 32, 3)
    page = images.grid([images.Tile(f"prompt {i}", p) for i, p in enumerate(pictures)])
    side = 128
    for tile in pictures:
        for picture in tile:
            big = picture.repeat(4, axis=0).repeat(4, axis=1)
            corner = np.argwhere((page[: -side + 1, : -side + 1] == big[0, 0]).all(-1))
            assert any(np.array_equal(page[y : y + side, x : x + side], big) for y, x in corner)
    assert np.any(np.all(page == images.INK, axis=-1))


def test_pictures_that_are_large_enough_stay_as_they_are():
    page = images.grid([images.Tile("", _noise(1, 200, 160, 3))])
    assert page.shape[:2] == (200 + 2 * images.MARGIN, 160 + 2 * images.MARGIN)


def test_grid_of_strange_captions_does_not_fail():
    captions = ["", "😀" * 50, "w" * 500, "ok", "مرحبا", "\u0301", "a\u202eb"]
    page = images.grid([images.Tile(c, _noise(2, 16, 16, 1)) for c in captions])
    assert page.dtype == np.uint8
    assert page.shape[2] == 3
