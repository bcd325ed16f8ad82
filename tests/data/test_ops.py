import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imagegpt_jax.data import images, ops
from imagegpt_jax.errors import UserError


def encoded(image, format="PNG", **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, format, **options)
    return out.getvalue()


def textured(height, width):
    y, x = np.mgrid[:height, :width]
    rgb = [128 + 100 * np.sin(x / 5), 128 + 100 * np.cos(y / 7), 40 + (x + y) % 200]
    return np.stack(rgb, axis=-1).astype(np.uint8)


def run(op_string, data, seed=0):
    """Applies an op string alone, and checks that it does the same inside tf.data."""
    tf = ops.import_tf()
    apply = ops.build(ops.parse(op_string))
    arguments = (tf.constant(data), tf.constant(images.sniff(data)), tf.constant([seed, 0], tf.int64))
    alone = apply(*arguments).numpy()
    dataset = tf.data.Dataset.from_tensors(arguments).map(apply)
    inside = next(dataset.as_numpy_iterator())
    np.testing.assert_array_equal(alone, inside)
    static = dataset.element_spec.shape
    assert static.is_compatible_with(alone.shape)
    return alone


# ---------------------------------------------------------------------------------------------------------- parsing


def test_parse():
    parsed = ops.parse("decode | resize((24, 32), method='bicubic')|value_range(0, 1)")
    assert [op.name for op in parsed] == ["decode", "resize", "value_range"]
    assert parsed[1].arguments == {"size": (24, 32), "method": "bicubic"}
    assert parsed[2].arguments == {"low": 0, "high": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decode|rezise(32)", r"unknown op 'rezise'.*Did you mean 'resize'\? Ops: decode, resize\(size, method="),
        ("resize(32)", "should begin with decode"),
        ("decode|value_range(0,1)|flip_lr", "should end with value_range"),
        ("decode|resize", r"do not fit: it is resize\(size, method='bilinear'\)"),
        ("decode|resize(32,typo=1)", "do not fit"),
        ("decode|resize(big)", "do not fit"),
        ("decode|resize(0)", "positive whole number of pixels"),
        ("decode|resize(8,'cubic')", "method is one of bilinear, bicubic"),
        ("decode|random_resized_crop(8,scale=(0.5,2))", "at most 1"),
        ("decode|value_range(1,-1)", "low is below high"),
        ("decode|pad_square(300)", "from 0 to 255"),
        ("decode||flip_lr", "not of the form"),
    ],
)  # fmt: skip
def test_bad_op_strings(text, message):
    with pytest.raises(UserError, match=message):
        ops.parse(text)


def test_parsing_does_not_load_tensorflow():
    program = "import sys; from imagegpt_jax.data import ops; ops.parse('decode|random_crop(3)|value_range');"
    out = subprocess.run(
        [sys.executable, "-c", program + "print('tensorflow' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "False"


# --------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_jpeg_gives_the_pixels_of_pillow(options):
    data = encoded(textured(50, 37), "JPEG", **options)
    assert images.sniff(data) == images.JPEG
    np.testing.assert_array_equal(run("decode", data), images.decode_image(data))


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_other_formats(format):
    data = encoded(textured(20, 30), format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(run("decode", data), expected)


def test_modes_become_rgb():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    in_palette = Image.fromarray(grey, "P")
    in_palette.putpalette([i for level in range(256) for i in (level, level, level)])
    for image in (
        Image.fromarray(grey),
        Image.fromarray(grey.astype(np.uint16) * 257),
        in_palette,
    ):
        np.testing.assert_array_equal(run("decode", encoded(image)), np.repeat(grey[..., None], 3, axis=-1))
    one_bit = Image.fromarray(grey > 100)
    np.testing.assert_array_equal(run("decode", encoded(one_bit))[..., 1], np.where(grey > 100, 255, 0))
    np.testing.assert_array_equal(
        images.decode_image(encoded(Image.fromarray(grey.astype(np.uint16) * 257))),
        np.repeat(grey[..., None], 3, axis=-1),
    )
    cmyk = encoded(Image.new("CMYK", (8, 8), (100, 10, 20, 30)), "JPEG")
    assert np.abs(run("decode", cmyk).astype(int) - images.decode_image(cmyk)).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_composited_on_white(format):
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[..., 0], rgba[:, 3:, 3] = 200, 128
    out = run("decode", encoded(rgba, format, **({"lossless": True} if format == "WEBP" else {})))
    assert (out[:, :3] == 255).all()
    assert np.abs(out[:, 3:].astype(int) - [227, 127, 127]).max() <= 1
    palette = Image.fromarray(np.zeros((4, 6), np.uint8), "P")
    palette.putpalette([10, 20, 30])
    assert (run("decode", encoded(palette, transparency=0)) == 255).all()


def test_exif_orientation_is_applied():
    image = Image.fromarray(textured(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image, "JPEG", exif=exif)
    assert run("decode", turned).shape == (30, 20, 3)
    exif[0x0112] = 1
    assert images.sniff(encoded(image, "JPEG", exif=exif)) == images.JPEG


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", encoded(textured(20, 20), "JPEG")[:200]])
def test_what_is_no_image(data):
    tf = ops.import_tf()
    with pytest.raises((tf.errors.OpError, ValueError)):
        run("decode", data)
    with pytest.raises(ValueError, match="image"):
        images.decode_image(data)


# -------------------------------------------------------------------------------------------------------------- ops


def test_resize_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    out = run("decode|resize((16, 24))", encoded(stripes))
    assert out.shape == (16, 24, 3)
    assert out.dtype == np.uint8
    assert np.abs(out[:, 1:-1].astype(int) - 127).max() < 40  # without it, stripes alias to 0 and 255
    reference = np.asarray(Image.fromarray(textured(60, 90)).resize((30, 20), Image.Resampling.BILINEAR))
    assert np.abs(run("decode|resize((20,30))", encoded(textured(60, 90))).astype(int) - reference).max() <= 2


def test_bicubic_does_not_wrap_around():
    edge = np.zeros((32, 32, 3), np.uint8)
    edge[:, 16:] = 255
    out = run("decode|resize(48,'bicubic')", encoded(edge))
    assert (out[:, :16] < 20).all()
    assert (out[:, 32:] > 235).all()


def test_resize_small_keeps_proportions():
    assert run("decode|resize_small(16)", encoded(textured(40, 70))).shape == (16, 28, 3)
    assert run("decode|resize_small(16)", encoded(textured(71, 33))).shape == (34, 16, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_central_crop(format):
    data = encoded(textured(40, 70), format)
    whole = images.decode_image(data)
    np.testing.assert_array_equal(run("decode|central_crop((10,20))", data), whole[15:25, 25:45])
    np.testing.assert_array_equal(run("decode|central_crop", data), whole[:, 15:55])
    small = run("decode|resize_small(20)|central_crop(20)", data)
    assert small.shape == (20, 20, 3)
    with pytest.raises(ops.import_tf().errors.InvalidArgumentError, match="smaller than the crop of 50 x 50"):
        run("decode|central_crop(50)", data)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_random_crop(format):
    data = encoded(textured(24, 31), format)
    whole = images.decode_image(data)
    windows = np.lib.stride_tricks.sliding_window_view(whole, (20, 20, 3))[:, :, 0]
    places = set()
    for seed in range(40):
        out = run("decode|random_crop(20)", data, seed) if seed < 3 else fast_crop(data, seed)
        places |= {tuple(p) for p in np.argwhere((windows == out).all((2, 3, 4)))}
    assert len(places) > 20
    assert {y for y, _ in places} == set(range(5))
    assert {0, 11} <= {x for _, x in places}
    assert run("decode|random_crop((24,31))", data).shape == (24, 31, 3)


def fast_crop(data, seed):
    tf = ops.import_tf()
    if "crop" not in CACHE:
        CACHE["crop"] = tf.function(ops.build(ops.parse("decode|random_crop(20)")))
    arguments = tf.constant(data), tf.constant(images.sniff(data)), tf.constant([seed, 0], tf.int64)
    return CACHE["crop"](*arguments).numpy()


CACHE = {}


def test_ten_crop():
    """The four corners and the middle of 24 x 30, each as it is and mirrored: all ten, equally often."""
    tf = ops.import_tf()
    image = textured(24, 30)
    corners = [(0, 0), (0, 10), (4, 0), (4, 10), (2, 5)]
    crops = [image[y : y + 20, x : x + 20] for y, x in corners]
    expected = [out for crop in crops for out in (crop, crop[:, ::-1])]
    crop = tf.function(ops.ten_crop(20))
    counts = np.zeros(10)
    for seed in range(300):
        out = crop(tf.constant(image), tf.constant([seed, 3], tf.int64)).numpy()
        counts += [np.array_equal(out, e) for e in expected]
    assert counts.sum() == 300
    assert np.all(np.abs(counts - 30) < 5 * np.sqrt(27))
    with pytest.raises(tf.errors.InvalidArgumentError, match="smaller than the crop"):
        crop(tf.constant(image[:10]), tf.constant([0, 0], tf.int64))


def test_random_resized_crop():
    tf = ops.import_tf()
    window = tf.function(ops.random_resized_crop(32, scale=(0.2, 0.5), ratio=(0.5, 2.0)))
    sizes = []
    for seed in range(200):
        y, x, h, w = (int(v) for v in window(tf.constant([60, 90, 3]), tf.constant([seed, 5], tf.int64)))
        assert y >= 0
        assert x >= 0
        assert y + h <= 60
        assert x + w <= 90
        sizes.append((h * w / 5400, w / h))
    area, aspect = np.array(sizes).T
    assert area.min() > 0.19
    assert area.max() < 0.52
    assert abs(area.mean() - 0.35) < 0.03
    assert aspect.min() < 0.6
    assert aspect.max() > 1.7
    whole = ops.random_resized_crop(32, scale=(1, 1), ratio=(1, 1))(
        tf.constant([60, 90, 3]), tf.constant([0, 0], tf.int64)
    )
    assert [int(v) for v in whole] == [0, 15, 60, 60]  # nothing fits: the largest of the ratio, in the middle


def test_a_fused_crop_has_the_same_pixels():
    tf = ops.import_tf()
    image = textured(61, 83)
    jpeg = encoded(image, "JPEG", quality=95)
    same_as_png = encoded(images.decode_image(jpeg))
    apply = tf.function(ops.build(ops.parse("decode|random_resized_crop(32)|flip_lr")))
    for seed in range(20):
        a, b = (
            apply(tf.constant(data), tf.constant(images.sniff(data)), tf.constant([seed, 0], tf.int64))
            for data in (jpeg, same_as_png)
        )
        np.testing.assert_array_equal(a, b)


def test_random_ops_follow_the_seed():
    data = encoded(textured(40, 40))
    outs = [run("decode|random_resized_crop(16)|flip_lr", data, seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert (outs[0] != outs[2]).any()


def test_flip_lr():
    image = textured(9, 14)
    flipped = 0
    tf = ops.import_tf()
    flip = ops.flip_lr()
    for seed in range(60):
        out = flip(tf.constant(image), tf.constant([seed, 1], tf.int64)).numpy()
        is_flipped = (out == image[:, ::-1]).all()
        assert is_flipped or (out == image).all()
        flipped += is_flipped
    assert 15 < flipped < 45
    assert run("decode|flip_lr", encoded(image)).shape == image.shape


def test_pad_square():
    image = textured(9, 14)
    out = run("decode|pad_square(7)", encoded(image))
    assert out.shape == (14, 14, 3)
    np.testing.assert_array_equal(out[2:11], image)
    assert (out[:2] == 7).all()
    assert (out[11:] == 7).all()
    np.testing.assert_array_equal(
        run("decode|pad_square", encoded(image.transpose(1, 0, 2)))[:, 2:11], image.transpose(1, 0, 2)
    )


def test_value_range():
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
    out = run("decode|value_range(-1,1)", encoded(grey))
    assert out.dtype == np.float32
    assert out.min() == -1
    assert out.max() == 1
    np.testing.assert_allclose(out, grey / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(ops.value_range_numpy(grey, -1, 1), out, atol=2e-7, rtol=0)
    np.testing.assert_allclose(run("decode|value_range(0,1)", encoded(grey)), grey / 255, atol=1e-6)
