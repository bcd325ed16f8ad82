"""What is scored: folders and arrays of images, statistics in their place, and what may be wrong with them."""

import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import artefacts, sets


def picture(seed=0, height=16, width=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write(folder, name, image, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def test_a_folder_in_the_order_of_its_paths(tmp_path):
    for number, name in enumerate(["b/2.png", "a.png", "b/10.png", "c.bmp"]):
        write(tmp_path, name, picture(number))
    (tmp_path / "notes.txt").write_text("not an image")
    folder = sets.open_images(tmp_path)
    assert list(folder.names) == ["a.png", "b/10.png", "b/2.png", "c.bmp"]
    assert (len(folder), folder.size, folder.formats) == (4, (16, 16), {"PNG": 3, "BMP": 1})
    np.testing.assert_array_equal(folder.read(1), picture(2))
    assert len(sets.open_images(tmp_path, limit=3)) == 3


@pytest.mark.parametrize("key", ["arr_0", "images"])
def test_an_array_is_read_one_image_after_another_and_again(tmp_path, key):
    images = np.stack([picture(i) for i in range(5)])
    np.savez_compressed(tmp_path / "x.npz", **{key: images, "labels": np.zeros(5)})
    array = sets.open_images(tmp_path / "x.npz", limit=4)
    assert (len(array), array.size) == (4, (16, 16))
    for number in (0, 1, 3, 1, 2):
        np.testing.assert_array_equal(array.read(number), images[number])


def grey(folder):
    write(folder, "a.png", Image.fromarray(picture()[..., 0]))


def alpha(folder):
    write(folder, "a.png", Image.fromarray(np.concatenate([picture(), picture()[..., :1]], axis=-1)))


def transparent_palette(folder):
    image = Image.fromarray(picture()).convert("P")
    write(folder, "a.png", image, transparency=0)


def deep(folder):
    write(folder, "a.png", Image.fromarray(picture()[..., 0].astype(np.uint16) * 257))


def deep_colour(folder):
    """A PNG of 16-bit RGB, which Pillow reads and cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def cmyk(folder):
    write(folder, "a.jpg", Image.fromarray(picture()).convert("CMYK"))


def mixed(folder):
    write(folder, "a.png", picture())
    write(folder, "b.png", picture(height=20))


def no_image(folder):
    (folder / "a.png").write_bytes(b"this is text")


def empty_file(folder):
    (folder / "a.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no images in .*should hold files that end in"),
        (grey, "a.png is greyscale"),
        (alpha, "a.png has an alpha channel"),
        (transparent_palette, "a.png has an alpha channel"),
        (deep, "a.png has 16 or more bits"),
        (deep_colour, "a.png has 16 or more bits"),
        (cmyk, "colour mode CMYK"),
        (mixed, r"differ in size, a.png is 16 x 16 and b.png is 20 x 16 \(height x width\)"),
        (no_image, "a.png is not an image"),
        (empty_file, "a.png is not an image"),
    ],
)
def test_folders_that_cannot_be_scored(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        sets.open_images(tmp_path)
    assert str(caught.value).count("\n") == 0


def test_a_damaged_image_is_named_when_it_is_read(tmp_path):
    data = io.BytesIO()
    Image.fromarray(picture(height=64, width=64)).save(data, "PNG")
    (tmp_path / "a.png").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    folder = sets.open_images(tmp_path)
    with pytest.raises(UserError, match="a.png is damaged .*: remove or replace it"):
        folder.read(0)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": np.zeros((3, 8, 8), np.uint8)}, "greyscale"),
        ({"arr_0": np.zeros((3, 8, 8, 4), np.uint8)}, "alpha"),
        ({"arr_0": np.zeros((3, 8, 8, 3), np.float32)}, "images are uint8"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "images are uint8"),
        ({"labels": np.zeros(3)}, "holds labels"),
    ],
)
def test_arrays_that_cannot_be_scored(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=words):
        sets.open_images(tmp_path / "x.npz")


def test_damaged_arrays(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", arr_0=np.stack([picture(i) for i in range(8)]))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    (tmp_path / "short.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a whole .npz"):
        sets.open_images(tmp_path / "short.npz")
    data[len(data) // 2] ^= 255
    (tmp_path / "bits.npz").write_bytes(data)
    array = sets.open_images(tmp_path / "bits.npz")
    with pytest.raises(UserError, match="is damaged"):
        array.read(7)  # reads all before it


@pytest.mark.parametrize("name", ["no/such/folder", "file.txt"])
def test_paths_that_hold_no_images(tmp_path, name):
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match="folder"):
        sets.open_images(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_references_of_adm_hold_statistics_beside_images(tmp_path):
    arrays = {"mu": np.arange(3.0), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "ref.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), **arrays)
    opened = sets.open_reference(tmp_path / "ref.npz")
    assert opened.arrays.keys() == {"pool", "spatial"}
    np.testing.assert_array_equal(opened.arrays["pool"][0], [0, 1, 2])
    assert (opened.count, opened.about) == (None, {})
    assert opened.sha256 == hashlib.sha256((tmp_path / "ref.npz").read_bytes()).hexdigest()


@pytest.mark.parametrize("key", ["pool_3", "arr_0"])
def test_activations_are_statistics_too(tmp_path, key):
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    np.savez(tmp_path / "acts.npz", **{key: rows})
    opened = sets.open_reference(tmp_path / "acts.npz")
    np.testing.assert_array_equal(opened.features(("inception", "pool")).block(0, 9), rows)
    np.testing.assert_allclose(opened.arrays["pool"][1], np.cov(rows, rowvar=False), rtol=1e-5, atol=1e-7)
    assert opened.count == 9


def test_our_own_statistics_say_what_they_are_of(tmp_path):
    about = json.dumps({"protocol": "clean_fid"})
    np.savez(tmp_path / "own.npz", mu=np.zeros(3), sigma=np.eye(3), n=np.int64(7), about=np.array(about))
    opened = sets.open_reference(tmp_path / "own.npz")
    assert (opened.count, opened.about) == (7, {"protocol": "clean_fid"})


def test_statistics_of_wrong_shapes(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(UserError, match="damaged"):
        sets.open_reference(tmp_path / "x.npz")


# ----------------------------------------------------------------------------------------------------------- artefacts


def smooth(seed):
    """A picture with edges and texture, such as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96] / 96
    waves = sum(np.sin(2 * np.pi * (rng.uniform(1, 9) * x + rng.uniform(1, 9) * y) + i) for i in range(6))
    shapes = 60 * (np.hypot(x - rng.uniform(), y - rng.uniform()) < 0.3)
    levels = 128 + 15 * waves + shapes + rng.normal(0, 3, (96, 96))
    return np.stack([levels, 0.9 * levels, 0.8 * levels + 20], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("quality", [75, 90])
def test_jpeg_leaves_traces(quality):
    for seed in range(6):
        plain = smooth(seed)
        data = io.BytesIO()
        Image.fromarray(plain).save(data, "JPEG", quality=quality)
        assert artefacts.looks_like_jpeg(np.asarray(Image.open(data)))
        assert not artefacts.looks_like_jpeg(plain)


def test_no_traces_where_there_is_little_to_see():
    assert not artefacts.looks_like_jpeg(np.full((64, 64, 3), 200, np.uint8))
    assert not artefacts.looks_like_jpeg(picture(height=16, width=16))
    blocks = picture(height=12, width=12).repeat(8, axis=0).repeat(8, axis=1)
    assert not artefacts.looks_like_jpeg(blocks)  # pixel art on a grid of eight is no JPEG
