"""The sampling binary: what it writes, what it refuses, and that nothing half-written stays."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from imagegpt_jax import images
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import functional, safety
from imagegpt_jax.inference import loading

STRANGE = ["noto emoji of red heart", "", "красный 😀", "../../etc/passwd", "a" * 1999, "CON: <|?*>"]


@pytest.fixture(scope="module")
def samples(workdirs, tmp_path_factory):
    """Runs the binary once as a person would."""
    output = tmp_path_factory.mktemp("sample") / "out"
    flags = [f"--decoder={workdirs.decoder}", f"--output={output}", "--num_images=2", "--seed=3", "--top_k=9"]
    flags += [f"--prompt={prompt}" for prompt in STRANGE] + ["--unconditional", "--step=1"]
    done = subprocess.run([sys.executable, "-m", "imagegpt_jax.sample", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, flags, done


def _rows(output):
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def test_every_picture_is_there_and_says_how_it_was_made(samples, workdirs):
    output, _, done = samples
    rows = _rows(output)
    assert [row["index"] for row in rows] == list(range(14))
    assert {path.name for path in output.iterdir()} == {row["file"] for row in rows} | {"samples.jsonl", "grid.png"}
    for row in rows:
        data = (output / row["file"]).read_bytes()
        assert images.read_metadata(data) == row
        with Image.open(output / row["file"]) as png:
            assert png.size == (16, 16)
            assert png.text["seed"] == "3"
    assert [row["prompt"] for row in rows[::2]] == [*STRANGE, ""]
    sampler = {"temperature": 1.0, "top_k": 9, "top_p": 1.0, "cfg_scale": 3.0, "cfg_schedule": "constant"}
    assert rows[0]["sampler"].items() >= sampler.items()
    assert (rows[0]["step"], rows[0]["tokenizer_step"]) == (1, 2)
    assert (rows[0]["decoder"], rows[0]["tokenizer"]) == (str(workdirs.decoder), str(workdirs.tokenizer))
    assert "only the beginning of 'aaaa" in done.stderr
    assert "image/s" in done.stderr
    assert "Traceback" not in done.stderr


def test_pictures_are_those_of_the_api(samples, workdirs):
    output, _, _ = samples
    gpt = loading.load_decoder(workdirs.decoder, step=1)
    expected = functional.generate(gpt, gpt.load_tokenizer(), STRANGE[:1], num_images=2, seed=3, top_k=9)
    for row, image in zip(_rows(output), expected, strict=False):
        with Image.open(output / row["file"]) as png:
            np.testing.assert_array_equal(np.asarray(png), image)


def test_grid_shows_the_pictures(samples):
    output, _, _ = samples
    page = np.asarray(Image.open(output / "grid.png"))
    first = np.asarray(Image.open(output / _rows(output)[0]["file"])).repeat(8, axis=0).repeat(8, axis=1)
    top = left = images.MARGIN
    np.testing.assert_array_equal(page[top : top + 128, left : left + 128], first)
    metadata = images.read_metadata((output / "grid.png").read_bytes())
    assert metadata["seed"] == 3


def test_same_request_is_done_other_request_is_refused(samples, binary):
    output, flags, _ = samples
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    binary("sample", *flags).main()
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    with pytest.raises(UserError, match=r"other samples.*--overwrite"):
        binary("sample", *flags, "--seed=4").main()
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_overwrite_replaces_everything(samples, binary, tmp_path, workdirs):
    flags = [f"--decoder={workdirs.decoder}", f"--output={tmp_path / 'o'}", "--prompt=dog"]
    binary("sample", *flags, "--num_images=2").main()
    binary("sample", *flags, "--overwrite").main()
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["00000-dog.png", "grid.png", "samples.jsonl"]


def test_classes(binary, workdirs, tmp_path):
    binary("sample", f"--decoder={workdirs.classes}", "--class=flags", "--class=3", f"--output={tmp_path / 'o'}").main()
    rows = _rows(tmp_path / "o")
    assert [row["class"] for row in rows] == [8, 3]
    assert [row["file"] for row in rows] == ["00000-class-flags.png", "00001-class-3.png"]


def test_an_interrupted_list_goes_on(binary, workdirs, tmp_path, monkeypatch, capsys):
    flags = [f"--decoder={workdirs.decoder}", f"--output={tmp_path / 'o'}", "--prompt=dog", "--num_images=3"]
    sample = binary("sample", *flags)
    whole = images.png_bytes

    def fails_at_the_third(image, metadata):
        if metadata.get("index") == 2:
            raise KeyboardInterrupt
        return whole(image, metadata)

    monkeypatch.setattr(images, "png_bytes", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        sample.main()
    assert [path.name for path in tmp_path.iterdir()] == [".o.unfinished"]
    lines = _rows(tmp_path / ".o.unfinished")
    assert len(lines) == 2
    first = tmp_path / ".o.unfinished" / "00000-dog.png"
    written = first.stat().st_mtime_ns

    # Another request does not take the pictures over; the same one goes on after them.
    monkeypatch.setattr(images, "png_bytes", whole)
    binary("sample", *flags, "--seed=1", f"--output={tmp_path / 'other'}").main()
    line = lines[0]  # as an older version wrote it
    sampler = line["sampler"]
    sampler |= {"no_repeat": sampler.pop("no_repeat_ngram_size"), "together": sampler.pop("tokens_per_step")}
    lines[0] = line | {"request": {"prompt": ["dog"]}, "draw": 0, "finish": {}, "found": line.pop("results")}
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / ".o.unfinished" / "samples.jsonl").write_text(text + '\n{"file": "cut o')
    binary("sample", *flags).main()
    assert "Going on after the 2 pictures" in capsys.readouterr().err
    assert (tmp_path / "o" / "00000-dog.png").stat().st_mtime_ns == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "other"]
    binary("sample", *flags, f"--output={tmp_path / 'whole'}").main()
    for row in _rows(tmp_path / "whole"):
        assert (tmp_path / "whole" / row["file"]).read_bytes() == (tmp_path / "o" / row["file"]).read_bytes()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Any picture, of another size and shape than the decoder's."""
    path = tmp_path_factory.mktemp("picture") / "cat.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    mask = np.zeros((16, 16), np.uint8)
    mask[:8, 8:] = 255
    Image.fromarray(mask).save(path.with_name("mask.png"))
    return path


TASKS = {
    "inpaint": ["--mask={mask}", "--prompt=dog", "--num_images=2"],
    "outpaint": ["--margins=4,0,0,8", "--prompt=dog"],
    "complete": ["--keep=0.25"],
    "variations": ["--strength=0.25", "--negative=cat"],
    "edit": ["--prompt=dog", "--region=4,4,8,8"],
    "style_transfer": ["--style=twemoji", "--source_style=noto", "--prompt=noto emoji of dog"],
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_of_a_picture_and_the_same_picture_again(binary, workdirs, tmp_path, picture, task):
    flags = [flag.format(mask=picture.with_name("mask.png")) for flag in TASKS[task]]
    flags += [f"--decoder={workdirs.decoder}", f"--{task}={picture}", "--seed=5", f"--output={tmp_path / 'o'}"]
    binary("sample", *flags).main()
    rows = _rows(tmp_path / "o")
    last = tmp_path / "o" / rows[-1]["file"]
    pixels = np.asarray(Image.open(last))

    gpt = loading.load_decoder(workdirs.decoder)
    tok, source = gpt.load_tokenizer(), images.read_picture(str(picture), (16, 16))[None]
    mask = images.read_mask(str(picture.with_name("mask.png")), (16, 16))
    assert mask.sum() == 64
    call = {
        "inpaint": lambda: functional.inpaint(gpt, tok, source, mask, "dog", num_images=2, seed=5),
        "outpaint": lambda: functional.outpaint(gpt, tok, source, (4, 0, 0, 8), "dog", seed=5),
        "complete": lambda: functional.complete(gpt, tok, source, 0.25, seed=5),
        "variations": lambda: functional.variations(gpt, tok, source, 0.25, seed=5, negative="cat"),
        "edit": lambda: functional.edit(gpt, tok, source, "dog", region=(4, 4, 8, 8), seed=5),
        "style_transfer": lambda: functional.style_transfer(
            gpt, tok, source, "twemoji", "noto", "noto emoji of dog", seed=5
        ),
    }[task]
    np.testing.assert_array_equal(pixels, call()[-1])
    assert rows[0]["request"]["images"][0]["path"] == str(picture)

    binary("sample", f"--from_image={last}", f"--output={tmp_path / 'again'}").main()
    (again,) = _rows(tmp_path / "again")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "again" / again["file"])), pixels)


def test_a_picture_is_drawn_again_from_its_metadata(binary, workdirs, tmp_path):
    flags = [f"--decoder={workdirs.decoder}", "--prompt=dog", "--prompt=cat", "--num_images=3", "--seed=8", "--top_k=7"]
    finish = ["--resize=40", "--contrast=1.3", "--upscaler=numpy:flipud"]
    binary("sample", *flags, *finish, "--cfg_schedule=linear", f"--output={tmp_path / 'o'}").main()
    rows = _rows(tmp_path / "o")
    assert len({row["decoder_hash"] for row in rows}) == 1
    for row in (rows[0], rows[4]):
        path, where = tmp_path / "o" / row["file"], tmp_path / f"again{row['index']}"
        with pytest.raises(UserError, match="--upscaler=numpy:flipud: give that flag if you trust it"):
            binary("sample", f"--from_image={path}", f"--output={where}").main()
        binary("sample", f"--from_image={path}", "--upscaler=numpy:flipud", f"--output={where}").main()
        (again,) = _rows(where)
        assert (again["prompt"], again["sampler"]) == (row["prompt"], row["sampler"])
        assert again["request"]["sample_indices"] == [row["index"]]
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (40, 40, 3)
        np.testing.assert_array_equal(np.asarray(Image.open(where / again["file"])), pixels)
    with pytest.raises(UserError, match="another decoder"):
        binary("sample", f"--from_image={path}", "--step=1", finish[2], f"--output={tmp_path / 'x'}").main()
    (tmp_path / "plain.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read"):
        binary("sample", f"--from_image={tmp_path / 'plain.png'}", f"--output={tmp_path / 'x'}").main()
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="no metadata"):
        binary("sample", f"--from_image={tmp_path / 'plain.png'}", f"--output={tmp_path / 'x'}").main()


def test_a_picture_of_before_is_drawn_again(binary, workdirs, tmp_path):
    """Metadata as they were written when they held flags: "request", "draw", "finish", "found" and old settings."""
    gpt = loading.load_decoder(workdirs.decoder)
    tok = gpt.load_tokenizer()
    sampler = {"temperature": 1.0, "top_k": 7, "top_p": 1.0, "min_p": 0.0, "no_repeat": 0, "cfg_scale": 3.0}
    sampler |= {"cfg_schedule": "constant", "cfg_power": 1.0, "cfg_start": 0.0, "cfg_end": 1.0, "weights": ""}
    about = {
        "file": "00003-dog.png",
        "index": 3,
        "prompt": "dog",
        "class": None,
        "request": {"prompt": ["dog"], "negative": "cat"},
        "draw": 3,
        "seed": 8,
        "sampler": sampler | {"speculative": 0, "together": 1},
        "decoder": str(workdirs.decoder),
        "step": 2,
        "decoder_hash": gpt.fingerprint(),
        "tokenizer": str(workdirs.tokenizer),
        "tokenizer_step": 2,
        "tokenizer_hash": tok.fingerprint,
        "version": "0.1.0",
        "finish": {"contrast": 1.3, "resize": ["24", "40"]},
        "found": {"log_likelihood": -66.0},
    }
    (tmp_path / "old.png").write_bytes(images.png_bytes(np.zeros((24, 40, 3), np.uint8), about))
    binary("sample", f"--from_image={tmp_path / 'old.png'}", f"--output={tmp_path / 'o'}").main()
    expected = functional.generate(gpt, tok, ["cat", "dog"], num_images=2, seed=8, top_k=7, negative="cat")[3]
    expected = images.contrast(images.resize(expected, (24, 40)), 1.3)
    (row,) = _rows(tmp_path / "o")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o" / row["file"])), expected)
    # Flags that are given replace what the picture says.
    flags = [f"--from_image={tmp_path / 'old.png'}", "--prompt=red heart", "--contrast=1", "--resize=16"]
    binary("sample", *flags, f"--output={tmp_path / 'p'}").main()
    (row,) = _rows(tmp_path / "p")
    expected = functional.generate(gpt, tok, "red heart", seed=8, top_k=7, negative="cat")[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "p" / row["file"])), expected)


def test_series_best_of_gif_and_npz(binary, workdirs, tmp_path):
    base = [f"--decoder={workdirs.decoder}", "--prompt=dog"]
    binary("sample", *base, "--interpolate=red heart", "--frames=4", f"--output={tmp_path / 'i'}").main()
    rows = _rows(tmp_path / "i")
    gpt = loading.load_decoder(workdirs.decoder)
    series = functional.interpolate(gpt, gpt.load_tokenizer(), "dog", "red heart", 4)
    for row, image in zip(rows, series, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "i" / row["file"])), image)
    binary("sample", f"--from_image={tmp_path / 'i' / rows[2]['file']}", f"--output={tmp_path / 'again'}").main()
    again = tmp_path / "again" / _rows(tmp_path / "again")[0]["file"]
    np.testing.assert_array_equal(np.asarray(Image.open(again)), series[2])

    extra = ["--best_of=4", "--num_images=2", "--gif", "--npz", "--scorer=words"]
    binary("sample", *base, *extra, f"--output={tmp_path / 'b'}").main()
    rows = _rows(tmp_path / "b")
    best = functional.generate(gpt, gpt.load_tokenizer(), "dog", num_images=2, best_of=4, scorer="words")
    arrays = np.load(tmp_path / "b" / "samples.npz")
    assert list(arrays) == ["arr_0"]
    np.testing.assert_array_equal(arrays["arr_0"], best)
    assert rows[0]["results"]["score"] >= rows[1]["results"]["score"]
    binary("sample", f"--from_image={tmp_path / 'b' / rows[1]['file']}", f"--output={tmp_path / 'again2'}").main()
    again = tmp_path / "again2" / _rows(tmp_path / "again2")[0]["file"]
    np.testing.assert_array_equal(np.asarray(Image.open(again)), best[1])
    with Image.open(tmp_path / "b" / "samples.gif") as gif:
        assert gif.n_frames == 16


def test_checks_flag_and_withhold_and_pictures_are_marked(binary, workdirs, tmp_path):
    (tmp_path / "blocked.txt").write_text("cat\n")
    base = [f"--decoder={workdirs.decoder}", "--prompt=dog", "--prompt=a cat"]
    checks = [f"--blocklist={tmp_path / 'blocked.txt'}", "--image_checker=numpy:mean", "--check_threshold=256"]
    binary("sample", *base, f"--output={tmp_path / 'plain'}").main()
    binary("sample", *base, *checks, f"--output={tmp_path / 'flagged'}").main()
    binary("sample", *base, *checks, "--withhold", f"--output={tmp_path / 'withheld'}").main()
    binary("sample", *base, "--invisible_watermark=us", f"--output={tmp_path / 'marked'}").main()
    rows = {name: _rows(tmp_path / name) for name in ("plain", "flagged", "withheld", "marked")}
    read = {
        name: [np.asarray(Image.open(tmp_path / name / row["file"])) for row in lines] for name, lines in rows.items()
    }
    assert "flagged" not in rows["plain"][0]["results"]
    for name in ("flagged", "withheld"):
        assert [row["results"]["flagged"] for row in rows[name]] == [False, True]
        assert [row["results"]["blocked"] for row in rows[name]] == [[], ["cat"]]
        np.testing.assert_allclose(rows[name][0]["results"]["unwanted"], read["plain"][0].mean())
    np.testing.assert_array_equal(read["flagged"], read["plain"])
    np.testing.assert_array_equal(read["withheld"][0], read["plain"][0])
    assert (read["withheld"][1] == safety.WITHHELD).all()
    assert [safety.watermark_share(image, "us") for image in read["marked"]] == [1, 1]
    np.testing.assert_allclose(read["marked"][0].astype(int), read["plain"][0], atol=1)


def test_several_devices_share_the_pictures(binary, workdirs, tmp_path):
    flags = [f"--decoder={workdirs.decoder}", "--prompt=dog", "--num_images=11", "--seed=2"]
    binary("sample", *flags, f"--output={tmp_path / 'one'}").main()
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"}
    for name, tensor in (("four", 1), ("cut", 2)):
        command = [sys.executable, "-m", "imagegpt_jax.sample", *flags, f"--tensor={tensor}"]
        done = subprocess.run(
            [*command, f"--output={tmp_path / name}"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    for row in _rows(tmp_path / "one"):
        one, four = (np.int32(Image.open(tmp_path / name / row["file"])) for name in ("one", "four"))
        # A pixel may round the other way where devices outnumber the processors, in JAX 0.12 and without AVX-512.
        processor = pathlib.Path("/proc/cpuinfo")
        exact = jax.__version_info__ < (0, 12) and processor.exists() and "avx512f" in processor.read_text()
        different = (one != four).sum()
        assert different <= (0 if exact else 3), different
        assert np.abs(one - four).max() <= 1
    assert len(_rows(tmp_path / "cut")) == 11


def test_captions(binary, workdirs, tmp_path, picture, capsys):
    flags = [f"--decoder={workdirs.decoder}", f"--caption={picture}", f"--output={tmp_path / 'o'}", "--num_images=2"]
    binary("sample", *flags).main()
    (row,) = _rows(tmp_path / "o")
    gpt = loading.load_decoder(workdirs.decoder)
    source = images.read_picture(str(picture), (16, 16))[None]
    assert row["captions"] == functional.caption(gpt, gpt.load_tokenizer(), source, num_captions=2)
    assert capsys.readouterr().out.startswith(f"{picture}\t{row['captions'][0]}\t")
    with pytest.raises(UserError, match="already there"):
        binary("sample", *flags).main()
    binary("sample", *flags, "--beams=3", "--overwrite").main()
    assert _rows(tmp_path / "o")[0]["captions"] == functional.caption(
        gpt, gpt.load_tokenizer(), source, num_captions=2, beams=3
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--inpaint=a.png"], "inpaint needs mask"),
        (["--inpaint=/no.png", "--mask=/no.png"], "/no.png cannot be read"),
        (["--edit=a.png"], "edit needs prompts"),
        (["--edit=a.png", "--complete=b.png"], "two modes"),
        (["--interpolate=a"], "interpolate needs prompts"),
        (["--prompt=a", "--grid=2"], "--grid=2 must be 2 whole numbers"),
        (["--prompt=a", "--scorer=likelyhood"], "Did you mean 'likelihood'"),
        (["--variations=a.png", "--prompt=a", "--prompt=b"], "2 prompts and 0 classes for 1 pictures"),
    ],
)
def test_mistakes_in_tasks_are_explained(binary, workdirs, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        binary("sample", f"--decoder={workdirs.decoder}", f"--output={tmp_path / 'o'}", *flags).main()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to draw"),
        (["--prompt=" + "x" * 2001], "--prompt number 1 has 2001 characters"),
        (["--prompts_file=/no/such/file"], "cannot be read"),
        (["--class=flag"], "was not trained on classes"),
        (["--prompt=a", "--step=7"], "step 7"),
        (["--prompt=a", "--top_p=0"], "top_p"),
        (["--prompt=a", "--temperature=-1"], "temperature"),
        (["--prompt=a", "--tokenizer=/no/such/folder"], "/no/such/folder"),
        (["--prompt=a", "--decoder=/no/such/folder"], "/no/such/folder"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(binary, workdirs, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        binary("sample", f"--decoder={workdirs.decoder}", f"--output={tmp_path / 'o'}", *flags).main()
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_not_ours_is_refused(binary, workdirs, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    for extra in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"holds other files \(photo.png\)"):
            binary("sample", f"--decoder={workdirs.decoder}", f"--output={tmp_path}", "--prompt=a", *extra).main()
    assert (tmp_path / "photo.png").read_bytes() == b"mine"
    with pytest.raises(UserError, match="is a file"):
        binary("sample", f"--decoder={workdirs.decoder}", f"--output={tmp_path / 'photo.png'}", "--prompt=a").main()
