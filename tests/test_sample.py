"""The sampling binary: what it writes, what it refuses, and that nothing half-written stays."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from imagegpt_jax import api, images
from imagegpt_jax.cli import UserError

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
    gpt = api.load_decoder(workdirs.decoder, step=1)
    expected = api.generate(gpt, gpt.load_tokenizer(), STRANGE[:1], num_images=2, seed=3, top_k=9)
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


def test_an_error_in_the_middle_leaves_nothing(binary, workdirs, tmp_path, monkeypatch):
    flags = [f"--decoder={workdirs.decoder}", f"--output={tmp_path / 'o'}", "--prompt=dog", "--num_images=3"]
    sample = binary("sample", *flags)
    whole = images.png_bytes

    def fails_at_the_second(image, metadata):
        if metadata.get("index") == 1:
            raise KeyboardInterrupt
        return whole(image, metadata)

    monkeypatch.setattr(images, "png_bytes", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        sample.main()
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


# ------------------------------------------------------------------------------------------------------------ prompts


def test_prompts_file(binary, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\n  # comment\n# other\n  zwei Räder 🚲 \nlast".encode())
    assert binary("sample").read_prompts(str(path)) == ["one", "zwei Räder 🚲", "last"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"good\nbad \xff\xfe line\n", "line 2 of .* is not UTF-8"),
        (b"good\n\n" + b"x" * 2001, "line 3 of .* has 2001 characters"),
        (b"good\nnul\0\n", "line 2 of .* is not text"),
        (b"# nothing\n\n", "has no prompts"),
    ],
)
def test_bad_lines_are_named(binary, tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        binary("sample").read_prompts(str(path))


def test_file_names_are_safe(binary):
    file_name = binary("sample").file_name
    assert file_name(3, "A red, Red bicycle!") == "00003-a-red-red-bicycle.png"
    assert file_name(0, "../..\\x:*\n") == "00000-x.png"
    assert file_name(12, "自転車") == "00012.png"
    assert file_name(1, "Café") == "00001-cafe.png"
    assert len(file_name(1, "word " * 500)) < 64


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("name", ["sample", "evaluate", "encode"])
def test_help_is_quick_and_names_every_flag(name):
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-m", f"imagegpt_jax.{name}", "--help"], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert out.returncode == 0
    assert f"python -m imagegpt_jax.{name} --" in out.stdout
    assert "\n  --output\n" in out.stdout
    loaded = "import sys, runpy; sys.argv = ['x', '--help']\n"
    loaded += f"try: runpy.run_module('imagegpt_jax.{name}', run_name='__main__')\n"
    loaded += "except SystemExit: print([m for m in ('jax', 'tensorflow', 'flax', 'orbax') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert out.stdout.strip().endswith("[]")
    assert seconds < 3


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("sample", ["--decoder=x", "--output=y", "--promt=a"], "Did you mean 'prompt'"),
        ("sample", ["--output=y", "--prompt=a"], "decoder"),
        ("sample", ["--decoder=x", "--output=y", "--num_images=0"], "num_images"),
        ("evaluate", ["--checkpoint=x", "--outputs=y"], "Did you mean 'output'"),
        ("encode", ["--tokenizer=x", "--data=emoji:train", "--output=y", "--batch_size=many"], "batch_size"),
    ],
)
def test_misspelt_flags_cost_one_sentence(name, flags, words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"imagegpt_jax.{name}", *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sample", ["--decoder=/no/such", "--prompt=a"]),
        ("evaluate", ["--checkpoint=/no/such"]),
        ("encode", ["--tokenizer=/no/such", "--data=emoji:train"]),
    ],
)
def test_a_wrong_folder_does_not_wait_for_jax(name, flags, tmp_path):
    code = f"import sys, runpy; sys.argv = {[name, *flags, f'--output={tmp_path}/o']!r}\n"
    code += f"try: runpy.run_module('imagegpt_jax.{name}', run_name='__main__')\n"
    code += "except SystemExit as e: print(e.code, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False"], done.stderr
    assert "/no/such" in done.stderr
