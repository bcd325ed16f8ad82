import subprocess
import sys
from pathlib import Path

from PIL import Image

from imagegpt_jax.data import text

TOOL = Path(__file__).parents[2] / "tools" / "train_text_tokenizer.py"


def train(*flags, ok=True):
    """Runs the tool as a user does; returns the last line of what it said."""
    done = subprocess.run([sys.executable, TOOL, *flags], capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stderr
    return (done.stdout if ok else done.stderr).strip().splitlines()[-1]


def test_trains_on_the_captions_of_a_folder(tmp_path):
    images, output = tmp_path / "images", tmp_path / "text"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a red heart\nplum plum")
    flags = [f"--data=folder:{images}", "--vocab_size=300", f"--output={output}"]
    said = train(*flags)
    tokenizer = text.load_tokenizer(output)
    assert said == f"{tokenizer.vocab_size} tokens: use them with --config.data.text_tokenizer={output}"
    assert 256 < tokenizer.vocab_size <= 300
    assert [len(ids) for ids in tokenizer.encode_batch(["red heart", "plum", "xyz"])] == [2, 1, 4]
    assert "already holds a tokenizer" in train(*flags, ok=False)


def test_bad_flags(tmp_path):
    assert "Did you mean 'train'?" in train("--data=emoji:trian", f"--output={tmp_path / 'text'}", ok=False)
    assert "--vocab_size" in train("--data=emoji:train", "--vocab_size=9", f"--output={tmp_path / 'text'}", ok=False)
    assert not (tmp_path / "text").exists()
