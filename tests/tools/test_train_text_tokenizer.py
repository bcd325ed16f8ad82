import pytest
from absl import flags
from PIL import Image

from imagegpt_jax.data import text
from imagegpt_jax.errors import UserError


def test_trains_on_the_captions_of_a_folder(tmp_path, load_tool, capsys):
    images, output = tmp_path / "images", tmp_path / "text"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a red heart\nplum plum")
    arguments = [f"--data=folder:{images}", "--vocab_size=300", f"--output={output}"]
    load_tool("train_text_tokenizer.py", *arguments).main()
    tokenizer = text.load_tokenizer(output)
    assert (
        capsys.readouterr().out.strip()
        == f"{tokenizer.vocab_size} tokens: use them with --config.data.text_tokenizer={output}"
    )
    assert 256 < tokenizer.vocab_size <= 300
    assert [len(ids) for ids in tokenizer.encode_batch(["red heart", "plum", "xyz"])] == [2, 1, 4]
    with pytest.raises(UserError, match="already holds a tokenizer"):
        load_tool("train_text_tokenizer.py", *arguments).main()


def test_bad_flags(tmp_path, load_tool):
    output = f"--output={tmp_path / 'text'}"
    with pytest.raises(UserError, match="Did you mean 'train'?"):
        load_tool("train_text_tokenizer.py", "--data=emoji:trian", output).main()
    with pytest.raises(flags.IllegalFlagValueError, match="--vocab_size"):
        load_tool("train_text_tokenizer.py", "--data=emoji:train", "--vocab_size=9", output)
    assert not (tmp_path / "text").exists()
