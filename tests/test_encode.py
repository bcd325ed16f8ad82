"""The encoding binary: codes of the right pictures, whatever the shards, interrupted or not."""

import pathlib

import numpy as np
import pytest

from imagegpt_jax import config as config_lib
from imagegpt_jax.data import images, sources
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import loading
from imagegpt_jax.tasks import decoder

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
SPEC = "emoji:validation,res=16,styles=noto"


@pytest.fixture
def encode(binary, workdirs, tmp_path):
    """Runs the binary into a folder and opens what it wrote."""

    def run(folder, *flags):
        flags = [f"--tokenizer={workdirs.tokenizer}", f"--output={tmp_path / folder}", *flags]
        if not any(flag.startswith("--data") for flag in flags):
            flags.append(f"--data={SPEC}")
        binary("encode", *flags).main()
        return sources.open_source(f"tokens:{tmp_path / folder}")

    return run


def _all(source):
    return source.__getitems__(range(len(source)))


def _same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x["id"], x["captions"], x["label"], x["grid"]) == (y["id"], y["captions"], y["label"], y["grid"])
        np.testing.assert_array_equal(x["codes"], y["codes"])


def test_records_hold_the_codes_captions_and_labels_of_the_source(encode, workdirs):
    tokens, pictures = encode("t"), sources.open_source(SPEC)
    tok = loading.load_tokenizer(workdirs.tokenizer)
    records, originals = _all(tokens), _all(pictures)
    codes_BL = tok.encode(np.stack([images.decode_image(r["image"]) for r in originals]))
    _same(records, [{**r, "codes": c, "grid": (4, 4)} for r, c in zip(originals, codes_BL, strict=True)])
    assert len(np.unique(codes_BL)) > 4
    info = tokens.info
    assert (info["tokenizer"], info["num_codes"], info["grid"]) == (tok.fingerprint, 64, [4, 4])
    assert (info["source"], info["source_fingerprint"]) == (SPEC, pictures.fingerprint)
    assert tuple(info["label_names"]) == pictures.label_names
    assert info["tokenizer_step"] == 2


def test_shards_and_interruptions_do_not_change_the_records(encode, binary, tmp_path, monkeypatch):
    whole = _all(encode("whole", "--ops=decode|random_resized_crop(16)|value_range(-1,1)"))
    flags = ["--ops=decode|random_resized_crop(16)|value_range(-1,1)", "--shard_size=20"]
    written = []
    from imagegpt_jax.data.shards import ShardWriter

    write = ShardWriter.write

    def stops_in_the_third_shard(self, shard, records):
        if len(written) == 2:
            next(iter(records))
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, records)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", stops_in_the_third_shard)
        with pytest.raises(KeyboardInterrupt):
            encode("parts", *flags)
    with pytest.raises(UserError, match="not finished"):
        sources.open_source(f"tokens:{tmp_path / 'parts'}")
    (tmp_path / "parts" / "tokens-00000-of-00005.array_record").rename(tmp_path / "lost")
    again = []

    def counts(self, shard, records):
        again.append(shard)
        write(self, shard, records)

    monkeypatch.setattr(ShardWriter, "write", counts)
    parts = encode("parts", *flags)
    assert (written, again) == ([0, 1], [0, 2, 3, 4])
    _same(_all(parts), whole)


def test_a_finished_set_is_left_alone_and_another_one_refused(encode, tmp_path):
    encode("t")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()}
    encode("t")
    with pytest.raises(UserError, match="already holds a data set"):
        encode("t", "--step=1")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()} == before


def test_several_processes_write_the_same_set_as_one(binary, workdirs, tmp_path):
    """Process i of n takes its own consecutive part; here one after another, in one process."""
    from imagegpt_jax.data import shards

    module = binary("encode")
    tok, source = loading.load_tokenizer(workdirs.tokenizer, batch_size=32), sources.open_source(SPEC)
    ranges = shards.shard_ranges(len(source), 16)
    ops = "decode|value_range(-1,1)"
    digests = []
    for parts in ([range(6)], [range(3, 6), range(0, 3)]):
        folder = tmp_path / str(len(parts))
        writer = shards.ShardWriter(folder, "tokens", ranges, kind="tokens", made_from="x")
        for part in parts:
            module.write(tok, source, ops, writer, part, seed=0)
        digests.append(writer.finish()["fingerprint"])
    assert digests[0] == digests[1]


def test_runs_of_consecutive_shards(binary):
    runs = binary("encode").runs
    assert runs([]) == []
    assert runs([0, 1, 2]) == [(0, 3)]
    assert runs([0, 2, 3, 7]) == [(0, 1), (2, 4), (7, 8)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data=emoji:vaildation"], "Did you mean 'validation'"),
        (["--data=folder:/no/such/folder"], "/no/such/folder"),
        (["--ops=decode|resise(16)"], "Did you mean 'resize'"),
        (["--ops=decode|resize(15)|value_range(-1,1)"], "multiples of 4"),
        (["--ops=decode|resize(16)|value_range(0,255)"], r"\[-1, 1\]"),
        (["--step=5"], "step 5"),
    ],
)
def test_mistakes_are_explained(encode, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        encode("t", *flags)
    assert list(tmp_path.iterdir()) == []


def test_token_shards_cannot_be_encoded_again(encode, tmp_path):
    encode("t")
    with pytest.raises(UserError, match="no image"):
        encode("u", f"--data=tokens:{tmp_path / 't'}")
    assert not (tmp_path / "u").exists()


def test_a_decoder_of_token_shards_needs_a_tokenizer_only_to_draw(encode, tmp_path):
    encode("t")
    config = config_lib.sibling(str(CONFIGS / "x.py"), "decoder.py").get_config("size=test")
    config.tokenizer, config.sample_prompts = "", ()
    config.data.train = config.data.validation = f"tokens:{tmp_path / 't'}"
    assert set(decoder.setup(config).networks) == {"decoder"}
    config.sample_prompts = ("noto emoji of red heart",)
    with pytest.raises(UserError, match="draws samples .*--config.tokenizer=untrained"):
        decoder.setup(config)
