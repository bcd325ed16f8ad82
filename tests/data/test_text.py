import json
import subprocess
import sys

import pytest
import tokenizers

from imagegpt_jax.data import text
from imagegpt_jax.data.emoji import pictures
from imagegpt_jax.errors import UserError

STRANGE = [
    "",
    "   ",
    "noto emoji of red heart",
    "A  Red\tHeart\n",
    "zxqv 12345 #!?",
    "❤️🔥👩🏽‍🚀",
    "قلب أحمر",
    "红色的心",
    "ﬁne piñata e\u0301",  # a ligature and a combining accent: changed by NFKC
    "\x00\x7f",
]


@pytest.fixture(scope="module")
def captions():
    return [f"noto emoji of {p.name}" for p in pictures()[:600]]


@pytest.fixture(scope="module")
def trained(captions):
    return text.train_tokenizer(captions, 512)


def test_every_text_comes_back_as_it_was_normalized(trained):
    ids = trained.encode_batch(STRANGE)
    assert [trained.decode(i) for i in ids] == [trained.normalize(t) for t in STRANGE]
    assert ids[0] == ids[1] == []
    assert trained.normalize("A  Red\tHeart\n") == "a red heart"
    assert trained.normalize("ﬁne e\u0301") == "fine é"
    assert all(0 <= i < trained.vocab_size for row in ids for i in row)


def test_known_words_are_short_and_case_does_not_matter(trained):
    plain, loud, word = trained.encode_batch(["noto emoji of", "NOTO Emoji  of ", "of"])
    assert plain == loud
    assert len(plain) == 3
    assert word == plain[2:]  # the same token at the start of a text as in the middle


def test_a_command_line_that_is_not_utf8(trained):
    [ids] = trained.encode_batch([b"red \xff heart".decode("utf-8", "surrogateescape")])
    assert trained.decode(ids) == "red ? heart"


def test_cut_off_characters_decode(trained):
    [ids] = trained.encode_batch(["心"])
    assert "\ufffd" in trained.decode(ids[:-1])


def test_training_is_deterministic(captions, trained):
    again = text.train_tokenizer(iter(captions), 512)
    assert again.fingerprint == trained.fingerprint
    assert again.vocab_size == trained.vocab_size == 512
    assert text.train_tokenizer(captions, 500).fingerprint != trained.fingerprint
    assert text.train_tokenizer(["ab ab"], 512).vocab_size == 256 + 2  # all there is to merge: " a", then " ab"


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path / "text")
    loaded = text.load_tokenizer(tmp_path / "text")
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.encode_batch(STRANGE) == trained.encode_batch(STRANGE)


def test_transformers_reads_what_we_save_and_we_read_what_it_saves(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    trained.save(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "ours"), local_files_only=True)
    assert theirs(STRANGE, add_special_tokens=False)["input_ids"] == trained.encode_batch(STRANGE)
    assert len(theirs) == trained.vocab_size
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert text.load_tokenizer(tmp_path / "theirs").encode_batch(STRANGE) == trained.encode_batch(STRANGE)

    # A folder without tokenizer.json: GPT-2's older pair of files.
    model = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]) + "\n")
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    [ids] = text.load_tokenizer(old).encode_batch([" red heart"])
    assert ids == trained.encode_batch(["red heart"])[0]


def test_settings_that_packing_replaces_are_switched_off(trained, tmp_path):
    trained.save(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    other.add_special_tokens(["[CLS]"])
    other.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 512)])
    other.enable_truncation(2)
    other.enable_padding(length=2)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = text.load_tokenizer(tmp_path)
    assert loaded.encode_batch(STRANGE) == trained.encode_batch(STRANGE)
    assert loaded.vocab_size == 513


def test_ids_with_gaps_fit_the_vocabulary(tmp_path):
    model = tokenizers.models.WordLevel({"a": 0, "b": 7}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert text.load_tokenizer(tmp_path).vocab_size == 8


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"model": 3}', b"\xff\xfe"])
def test_a_folder_without_a_tokenizer(content, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        text.load_tokenizer(tmp_path)


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        text.load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="at least 256"):
        text.train_tokenizer(["a"], 255)
    with pytest.raises(UserError, match="no captions"):
        text.train_tokenizer(["", "  "], 512)


def test_importing_is_light():
    code = "import sys, imagegpt_jax.data.text; print({'transformers', 'jax', 'tensorflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_tokenizer_without_words_keeps_nothing(tmp_path):
    text.no_words().save(tmp_path)
    for tokenizer in (text.no_words(), text.load_tokenizer(tmp_path)):
        assert tokenizer.vocab_size == 0
        assert tokenizer.encode_batch(["a red heart", ""]) == [[], []]
        assert tokenizer.decode([]) == ""
