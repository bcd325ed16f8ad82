"""Validation splits that nobody named: a share of the training set, by name."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from imagegpt_jax.data import holdout
from imagegpt_jax.data.mixture import Mixture, renumber
from imagegpt_jax.data.shards import ShardWriter, shard_ranges
from imagegpt_jax.data.sources import open_source
from imagegpt_jax.errors import UserError

TRAIN, VALIDATION = ",subset=train,validation_share=0.1", ",subset=validation,validation_share=0.1"


def make_config(train, validation="", share=0.1):
    return ConfigDict({"data": {"train": train, "validation": validation, "validation_share": share}})


def put_images(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / name)


def ids(spec):
    source = open_source(spec)
    return [r["id"] for r in source.__getitems__(range(len(source)))]


@pytest.mark.parametrize(
    ("train", "both"),
    [
        ("emoji:train,res=32", ("emoji:train,res=32", "emoji:validation,res=32")),
        ("tfds:a,split=train,data_dir=/b", ("tfds:a,split=train,data_dir=/b", "tfds:a,split=validation,data_dir=/b")),
        ("folder:/a, b", (f"folder:/a, b{TRAIN}", f"folder:/a, b{VALIDATION}")),
        ("my.data:f:x", (f"my.data:f:x{TRAIN}", f"my.data:f:x{VALIDATION}")),
        (f"folder:/a{TRAIN}", (f"folder:/a{TRAIN}", f"folder:/a{VALIDATION}")),
        (
            "0.7*emoji:train + 0.3*tokens:/t",
            (f"0.7*emoji:train + 0.3*tokens:/t{TRAIN}", f"0.7*emoji:validation + 0.3*tokens:/t{VALIDATION}"),
        ),
    ],
)
def test_specs_of_both_splits(train, both):
    given = make_config(train)
    config = holdout.resolve(given)
    assert (config.data.train, config.data.validation) == both
    assert holdout.resolve(config) is config  # nothing is left to do
    assert given.data.validation == ""


def test_a_validation_set_that_is_named_stays():
    config = make_config("folder:/a", "folder:/b", share=7)
    assert holdout.resolve(config) is config


@pytest.mark.parametrize("share", [0, 0.9, -1])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match=r"config.data.validation_share=.* must be above 0 and at most 0.5"):
        holdout.resolve(make_config("folder:/a", share=share))


def test_splits_of_a_folder_never_overlap_and_stay_when_it_grows(tmp_path):
    put_images(tmp_path, [f"{i}.png" for i in range(100)])
    train, validation = (f"folder:{tmp_path}{part}" for part in (TRAIN, VALIDATION))
    before = set(ids(train)), set(ids(validation))
    assert before[0] | before[1] == {f"{i}.png" for i in range(100)}
    assert not before[0] & before[1]
    assert 4 <= len(before[1]) <= 18
    whole = open_source(f"folder:{tmp_path}")
    assert len({open_source(spec).fingerprint for spec in (train, validation)} | {whole.fingerprint}) == 3
    put_images(tmp_path, [f"more/{i}.png" for i in range(50)])
    after = set(ids(train)), set(ids(validation))
    assert before[0] <= after[0]
    assert before[1] <= after[1]


@pytest.mark.parametrize("count", [2, 3])
def test_each_side_has_at_least_one(tmp_path, count):
    put_images(tmp_path, [f"{i}.png" for i in range(count)])
    config = holdout.resolve(make_config(f"folder:{tmp_path}", share=0.001))
    assert len(ids(config.data.validation)) == 1
    assert len(ids(config.data.train)) == count - 1
    put_images(tmp_path / "one", ["a.png"])
    with pytest.raises(UserError, match="1 record, none to keep aside"):
        open_source(f"folder:{tmp_path / 'one'}{VALIDATION}")


def test_token_shards_of_a_folder_are_split_as_the_folder_is(tmp_path):
    names = [f"{i}.png" for i in range(60)]
    put_images(tmp_path / "photos", names)
    ranges = shard_ranges(len(names), 25)
    writer = ShardWriter(tmp_path / "tokens", "tokens", ranges, kind="tokens", made_from="photos")
    for shard, (start, stop) in enumerate(writer.ranges):
        rows = ({"id": name, "codes": np.zeros(1, np.int32), "grid": (1, 1)} for name in sorted(names)[start:stop])
        writer.write(shard, rows)
    writer.finish()
    photos = set(ids(f"folder:{tmp_path / 'photos'}{VALIDATION}"))
    assert set(ids(f"tokens:{tmp_path / 'tokens'}{VALIDATION}")) == photos


@pytest.mark.parametrize(
    ("options", "words"),
    [("subset=test", "subset is train or validation"), ("validation_share=x", "'x' is not a number"),
     ("subst=train", "unknown option 'subst'")],
)  # fmt: skip
def test_options_that_cannot_be(tmp_path, options, words):
    put_images(tmp_path, ["a.png", "b.png"])
    with pytest.raises(UserError, match=words):
        open_source(f"folder:{tmp_path},{options}")


def test_names_decide_the_numbers_of_classes(tmp_path):
    put_images(tmp_path / "train", ["ant/1.png", "bee/1.png", "cat/1.png"])
    put_images(tmp_path / "validation", ["ant/2.png", "cat/2.png"])
    names = open_source(f"folder:{tmp_path / 'train'}").label_names
    source = renumber(open_source(f"folder:{tmp_path / 'validation'}"), names)
    assert [r["label"] for r in source.__getitems__([0, 1])] == [0, 2]
    assert source.label_names == names
    mixed = Mixture([open_source(f"folder:{tmp_path / 'validation'}")] * 2, [2, 1])
    assert [r["label"] for r in renumber(mixed, names).__getitems__([1, 3])] == [2, 2]
    assert renumber(mixed, names).weights == mixed.weights
    put_images(tmp_path / "validation", ["dog/2.png"])
    with pytest.raises(UserError, match=r"validation has the class 'dog', which is none .* \(ant, bee, cat\)"):
        renumber(open_source(f"folder:{tmp_path / 'validation'}"), names)


def test_a_folder_says_which_files_it_does_not_read(tmp_path):
    put_images(tmp_path, ["a.png", "b.png"])
    for name in ("c.HEIC", "d.heic", "e.mov", "notes.txt"):
        (tmp_path / name).touch()
    rows = [{"file_name": f"{name}.png", "text": name} for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_source(f"folder:{tmp_path}").describe().endswith(", other files: 2 .heic, 1 .mov")
    assert open_source(f"folder:{tmp_path}{TRAIN}").describe().startswith("1 of folder:")
