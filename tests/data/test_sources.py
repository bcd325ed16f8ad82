import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imagegpt_jax.data.mixture import Mixture
from imagegpt_jax.data.shards import ShardSource, ShardWriter, decode_record, encode_record, shard_ranges
from imagegpt_jax.data.sources import open_source
from imagegpt_jax.errors import UserError


def put_image(path, size=(8, 6), colour=(200, 10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def records(source):
    return source.__getitems__(range(len(source)))


# ---------------------------------------------------------------------------------------------------------- folders


def test_folder_with_sidecars(tmp_path):
    for name in ("b.png", "sub/a.jpg", ".hidden/x.png"):
        put_image(tmp_path / name)
    (tmp_path / "b.txt").write_text("first caption\n\nsecond: ein Bär 🐻\n", "utf-8")
    source = open_source(f"folder:{tmp_path}")
    assert source.convention == "sidecars"
    assert [r["id"] for r in records(source)] == ["b.png", "sub/a.jpg"]
    assert [r["captions"] for r in records(source)] == [["first caption", "second: ein Bär 🐻"], []]
    assert "label" not in records(source)[0]
    assert records(source)[0]["image"] == (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match=r"1 of 2 images .* no caption, the first is sub/a.jpg: write sub/a.txt"):
        open_source(f"folder:{tmp_path}", require="captions")
    (tmp_path / "sub/a.txt").write_bytes(b"caf\xe9")
    assert records(open_source(f"folder:{tmp_path}", require="captions"))[1]["captions"] == ["caf\ufffd"]


def test_folder_with_metadata_jsonl(tmp_path):
    for name in ("a.png", "b.png", "train/c.png"):
        put_image(tmp_path / name)
    rows = [{"file_name": "a.png", "text": "an a, or so"}, {"file_name": "./train/c.png", "text": ["c1", "c\u2028 2"]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", "utf-8")
    source = open_source(f"folder:{tmp_path}", require="captions")
    assert source.convention == "metadata"
    assert [(r["id"], r["captions"]) for r in records(source)] == [
        ("a.png", ["an a, or so"]),
        ("train/c.png", ["c1", "c\u2028 2"]),
    ]
    assert source.left_out == 1
    assert "1 left out" in source.describe()


def test_folder_with_metadata_csv_in_sub_folders_and_labels(tmp_path):
    for name in ("x/a.png", "y/a.png"):
        put_image(tmp_path / name)
    for folder, label in (("x", "10"), ("y", "9")):
        (tmp_path / folder / "metadata.csv").write_text(f'file_name,caption,label\na.png,"red, {folder}",{label}\n')
    source = open_source(f"folder:{tmp_path}", require="label")
    assert [(r["captions"], r["label"]) for r in records(source)] == [(["red, x"], 1), (["red, y"], 0)]
    assert source.label_names == ("9", "10")


def test_folder_with_classes(tmp_path):
    for name in ("zebra/1.png", "ant/2.png", "ant/deep/3.webp"):
        put_image(tmp_path / name)
    source = open_source(f"folder:{tmp_path}", require="label")
    assert source.convention == "classes"
    assert source.label_names == ("ant", "zebra")
    assert [(r["id"], r["label"]) for r in records(source)] == [
        ("ant/2.png", 0),
        ("ant/deep/3.webp", 0),
        ("zebra/1.png", 1),
    ]
    with pytest.raises(UserError, match=r"have no caption.*add a .txt file beside each image"):
        open_source(f"folder:{tmp_path}", require="captions")


def test_folder_of_images_only(tmp_path):
    put_image(tmp_path / "1.png")
    source = open_source(f"folder:{tmp_path}")
    assert source.convention == "images"
    assert set(records(source)[0]) == {"id", "image"}
    with pytest.raises(UserError, match="have no label"):
        open_source(f"folder:{tmp_path}", require="label")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{oops\n', r"metadata.jsonl, line 2: not JSON"),
        ("metadata.jsonl", "[1]\n", "line 1: expected an object"),
        ("metadata.jsonl", '{"text": "x"}\n', "line 1 has no file_name"),
        ("metadata.jsonl", '{"file_name": "z.png", "text": "x"}\n', "line 1 names 'z.png', which is no image"),
        ("metadata.jsonl", '{"file_name": "a.png", "words": "x"}\n', "columns file_name, words: call the caption's"),
        ("metadata.csv", "file_name,text\na.png,one, two\n", "line 2: more fields than the header"),
    ],
)
def test_bad_metadata_names_file_and_line(tmp_path, file, text, message):
    put_image(tmp_path / "a.png")
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(f"folder:{tmp_path}")


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        open_source(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"holds no image \(nothing\)"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"1 files, the first is notes.md"):
        open_source(f"folder:{tmp_path}")
    with pytest.raises(UserError, match="is a file"):
        open_source(f"folder:{tmp_path / 'notes.md'}")


def test_folder_fingerprint_follows_the_content(tmp_path):
    put_image(tmp_path / "a.png")
    first = open_source(f"folder:{tmp_path}").fingerprint
    assert open_source(f"folder:{tmp_path}").fingerprint == first
    (tmp_path / "a.txt").write_text("caption")
    second = open_source(f"folder:{tmp_path}").fingerprint
    put_image(tmp_path / "b.png")
    assert len({first, second, open_source(f"folder:{tmp_path}").fingerprint}) == 3


# ----------------------------------------------------------------------------------------------------------- shards


def write_shards(folder, count=10, shard_size=4, kind="images", **extra):
    writer = ShardWriter(folder, "train", shard_ranges(count, shard_size), kind=kind, made_from="test")
    for shard, (start, stop) in enumerate(writer.ranges):
        writer.write(
            shard, ({"id": f"r{i}", "image": bytes([i]), "captions": [f"c{i}"], **extra} for i in range(start, stop))
        )
    return writer


def test_records_survive_the_encoding():
    record = {
        "id": "ä",
        "image": b"\0\xff",
        "captions": ["", "日本"],
        "label": 3,
        "codes": np.array([1, 65535]),
        "grid": (1, 2),
    }
    back = decode_record(encode_record(record))
    assert {k: v for k, v in back.items() if k != "codes"} == {k: v for k, v in record.items() if k != "codes"}
    assert back["codes"].dtype == np.int32
    assert back["codes"].tolist() == [1, 65535]
    large = {"id": "x", "codes": np.array([0, 1 << 17, 5, 6]), "grid": (2, 2)}
    assert decode_record(encode_record(large))["codes"].tolist() == [0, 1 << 17, 5, 6]
    assert len(encode_record(record)) < len(encode_record(record | {"codes": np.array([1, 65536])}))
    assert decode_record(encode_record({"id": "x", "captions": ["half \ud83d pair"]}))["captions"] == ["half ? pair"]
    with pytest.raises(ValueError, match="3 codes do not fill"):
        encode_record({"id": "x", "codes": np.zeros(3, int), "grid": (2, 2)})


def test_shards_random_access(tmp_path):
    write_shards(tmp_path / "d", label=2).finish(label_names=["a", "b", "c"], tokenizer="none")
    source = open_source(f"array_record:{tmp_path / 'd'}", require="captions")
    assert len(source) == 10
    assert [r["id"] for r in source.__getitems__([9, 0, 4, 0])] == ["r9", "r0", "r4", "r0"]
    assert source.label_names == ("a", "b", "c")
    assert source.info["tokenizer"] == "none"
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["dataset.json"] + [
        f"train-{i:05d}-of-00003.array_record" for i in range(3)
    ]
    some = open_source(f"array_record:{tmp_path}/d/train-0000[12]*")
    assert [r["id"] for r in records(some)] == [f"r{i}" for i in range(3, 10)]
    assert some.label_names == ("a", "b", "c")
    with pytest.raises(IndexError):
        source.__getitems__([10])


def test_fingerprint_is_of_the_records(tmp_path):
    infos = [
        write_shards(tmp_path / "a").finish(),
        write_shards(tmp_path / "b").finish(label_names=["x"]),
        write_shards(tmp_path / "c", label=1).finish(),
    ]
    assert infos[0]["fingerprint"] == infos[1]["fingerprint"] != infos[2]["fingerprint"]


def test_interrupted_writing_is_continued(tmp_path):
    ranges = shard_ranges(10, 4)
    writer = ShardWriter(tmp_path, "train", ranges, kind="images", made_from="test")
    writer.write(1, ({"id": f"r{i}", "image": b"x"} for i in range(*ranges[1])))

    def broken():
        yield {"id": "r0", "image": b"x"}
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        writer.write(0, broken())
    with pytest.raises(UserError, match="was not finished"):
        open_source(f"array_record:{tmp_path}")
    with pytest.raises(ValueError, match="2 of 3 shards are missing"):
        writer.finish()
    with pytest.raises(UserError, match="beginning of another data set"):
        ShardWriter(tmp_path, "train", ranges, kind="images", made_from="something else")
    again = ShardWriter(tmp_path, "train", ranges, kind="images", made_from="test")
    assert [again.is_finished(i) for i in range(3)] == [False, True, False]
    assert not list(tmp_path.glob(".*"))
    for i in (0, 2):
        again.write(i, ({"id": f"r{j}", "image": b"x"} for j in range(*ranges[i])))
    again.finish()
    assert [r["id"] for r in records(open_source(f"array_record:{tmp_path}"))] == [f"r{i}" for i in range(10)]
    with pytest.raises(UserError, match="already holds a data set"):
        ShardWriter(tmp_path, "train", ranges, kind="images", made_from="test")


def test_a_shard_of_the_wrong_length_is_not_kept(tmp_path):
    writer = ShardWriter(tmp_path / "d", "train", [(0, 3)], kind="images", made_from="test")
    with pytest.raises(ValueError, match="2 records where 3 were planned"):
        writer.write(0, ({"id": str(i)} for i in range(2)))
    writer.abandon(keep_finished=True)
    assert not (tmp_path / "d").exists()


def test_shards_in_the_home_folder(tmp_path, monkeypatch):
    write_shards(tmp_path / "d").finish()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(ShardSource("~/d")) == len(ShardSource(str(tmp_path / "d"))) > 0


def test_damaged_shards(tmp_path):
    write_shards(tmp_path / "d").finish()
    shard = tmp_path / "d" / "train-00000-of-00003.array_record"
    data = bytearray(shard.read_bytes())
    place = data.index(encode_record({"id": "r1", "image": b"\1", "captions": ["c1"]}))
    data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00000-of-00003.array_record is damaged"):
        ShardSource(str(tmp_path / "d")).__getitems__([0, 1])
    shard.write_bytes(data[:1000])
    with pytest.raises(UserError, match="not a whole ArrayRecord file"):
        ShardSource(str(tmp_path / "d")).__getitems__([0])
    shard.unlink()
    with pytest.raises(UserError, match="lacks 1 shards"):
        ShardSource(str(tmp_path / "d"))
    with pytest.raises(UserError, match="no file matches"):
        ShardSource(str(tmp_path / "d" / "test-*"))


def test_token_shards_are_not_images(tmp_path):
    write_shards(tmp_path / "d", kind="tokens", codes=np.arange(4), grid=(2, 2)).finish()
    assert open_source(f"tokens:{tmp_path / 'd'}", require="codes").__getitems__([3])[0]["grid"] == (2, 2)
    with pytest.raises(UserError, match=r"holds tokens, not images: write tokens:"):
        open_source(f"array_record:{tmp_path / 'd'}")
    with pytest.raises(UserError, match="has no label"):
        open_source(f"tokens:{tmp_path / 'd'}", require="label")


# ------------------------------------------------------------------------------------------------ specs and mixtures


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("foldr:/x", "unknown kind of data 'foldr'.*Did you mean 'folder'"),
        ("/data/cats", "write folder:/data/cats"),
        ("emoji", "Did you mean 'emoji'|does not say what kind|lacks what comes after emoji"),
        ("emoji:trian", "Did you mean 'train'"),
        ("emoji:train,rse=64", "unknown option 'rse'. Did you mean 'res'"),
        ("emoji:train,res=big", "res='big' is not a whole number"),
        ("emoji:train,styles=noto+twemojy", "Did you mean 'twemoji'"),
        ("tfds:coco_captions", "write tfds:coco_captions,split=train"),
        ("folder:", "lacks what comes after folder"),
        ("0.7*emoji:train + folder:/x", "weights to some of its parts only"),
        ("lots*emoji:train", "'lots'.*is not a number"),
    ],
)
def test_misspelt_specs(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_opening_loads_neither_tensorflow_nor_jax(tmp_path):
    put_image(tmp_path / "a.png")
    program = (
        "import sys; from imagegpt_jax.data.sources import open_source;"
        f"open_source('emoji:train'); open_source('folder:{tmp_path}');"
        "print([m for m in ('tensorflow', 'jax', 'flax', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_mixture(tmp_path):
    for name in ("a/cat/1.png", "a/dog/2.png", "b/dog/3.png", "b/eel/4.png", "b/eel/5.png"):
        put_image(tmp_path / name)
    source = open_source(f"0.25*folder:{tmp_path}/a + 0.75*folder:{tmp_path}/b")
    assert isinstance(source, Mixture)
    assert source.weights == [0.25, 0.75]
    assert source.label_names == ("cat", "dog", "eel")
    assert [(r["id"], r["label"]) for r in source.__getitems__([4, 0, 2, 1])] == [
        ("eel/5.png", 2), ("cat/1.png", 0), ("dog/3.png", 1), ("dog/2.png", 1)
    ]  # fmt: skip
    assert open_source(f"folder:{tmp_path}/a + folder:{tmp_path}/b").weights == [2, 3]
    with pytest.raises(UserError, match="weights of a mixture are positive"):
        open_source(f"-1*folder:{tmp_path}/a + 2*folder:{tmp_path}/b")
    (tmp_path / "a/cat/1.txt").write_text("x")
    with pytest.raises(UserError, match="no caption"):
        open_source(f"folder:{tmp_path}/a + folder:{tmp_path}/b", require="captions")


# ------------------------------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A folder with two prepared sets: captions like COCO's as array_record, class labels as tfrecord."""
    from imagegpt_jax.data.tfds_source import import_tfds

    tfds = import_tfds()

    def picture(i):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(out, "JPEG")
        return out.getvalue()

    class Captioned(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            texts = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
            features = {"image": tfds.features.Image(encoding_format="jpeg"), "captions": texts, "junk": np.int64}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(6), "val": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                captions = [{"id": j, "text": f"picture {i}, caption {j} é"} for j in range(i % 3 + 1)]
                yield i, {"image": picture(i), "captions": captions, "junk": i}

    class Labelled(Captioned):
        def _info(self):
            names = tfds.features.ClassLabel(names=["cat", "dog"])
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": names})
            )

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": picture(i), "label": i % 2}

    folder = tmp_path_factory.mktemp("tfds")
    Captioned(data_dir=folder, file_format="array_record").download_and_prepare()
    Labelled(data_dir=folder, file_format="tfrecord").download_and_prepare()
    return folder


def test_tfds_captions(tfds_folder):
    source = open_source(f"tfds:captioned,split=train,data_dir={tfds_folder}", require="captions")
    assert len(source) == 6
    results = {tuple(r["captions"]): r for r in records(source)}
    assert tuple(f"picture 5, caption {j} é" for j in range(3)) in results
    assert all(r["image"][:2] == b"\xff\xd8" and set(r) == {"id", "image", "captions"} for r in results.values())
    assert len(open_source(f"tfds:captioned,split=train[:2],data_dir={tfds_folder}")) == 2
    assert source.fingerprint != open_source(f"tfds:captioned,split=val,data_dir={tfds_folder}").fingerprint
    with pytest.raises(UserError, match=r"has no split 'vall'. Did you mean 'val'"):
        open_source(f"tfds:captioned,split=vall,data_dir={tfds_folder}")


def test_tfds_that_cannot_be_used_says_what_to_do(tfds_folder, tmp_path):
    with pytest.raises(UserError, match=r"imagegpt-jax pack --tfds=labelled --split=train .*--output=DIR"):
        open_source(f"tfds:labelled,split=train,data_dir={tfds_folder}")
    with pytest.raises(UserError, match=r"TFDS knows no data set 'mnits'. Did you mean 'mnist'"):
        open_source("tfds:mnits,split=train")
    with pytest.raises(UserError, match=r"is not prepared.*file_format='array_record'"):
        open_source(f"tfds:mnist,split=train,data_dir={tmp_path}")
