import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from imagegpt_jax.data.sources import open_source
from imagegpt_jax.errors import UserError


@pytest.fixture
def pack(binary, capsys):
    """Runs the binary; returns what it printed, or its error."""

    def run(*flags, ok=True):
        module = binary("pack", *flags)
        if ok:
            module.main()
            return capsys.readouterr().out
        with pytest.raises(UserError) as e:
            module.main()
        return f"error: {e.value}"

    return run


def picture(i, format="JPEG"):
    out = io.BytesIO()
    Image.new("RGB", (8 + i, 8), (20 * i, 0, 0)).save(out, format)
    return out.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def contents(folder):
    source = open_source(f"array_record:{folder}")
    return source, source.__getitems__(range(len(source)))


def make_folder(folder, count=5):
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))


def test_folder(tmp_path, pack):
    images, packed = tmp_path / "images", tmp_path / "packed"
    make_folder(images)
    out = pack(f"--input={images}", f"--output={packed}", "--shard_size=2")
    assert "5 images, 2 classes from sub-folders" in out
    assert f"use it as array_record:{packed}" in out
    source, records = contents(packed)
    assert source.label_names == ("a", "b")
    assert [(r["id"], r["label"]) for r in records] == [
        ("a/0.jpg", 0), ("a/2.jpg", 0), ("a/4.jpg", 0), ("b/1.jpg", 1), ("b/3.jpg", 1)
    ]  # fmt: skip
    assert records[1]["image"] == picture(2)
    assert len(list(packed.iterdir())) == 4
    assert "already holds a data set" in pack(f"--input={images}", f"--output={packed}", ok=False)


def test_an_image_that_is_none_leaves_nothing_behind(tmp_path, pack):
    images, packed = tmp_path / "images", tmp_path / "packed"
    make_folder(images)
    (images / "b" / "3.jpg").write_bytes(b"<html>")
    said = pack(f"--input={images}", f"--output={packed}", "--shard_size=2", ok=False)
    assert said == "error: b/3.jpg is not an image: replace or remove it, then run this again."
    assert not packed.exists()


def test_an_interrupted_run_is_continued(tmp_path, pack):
    images, packed = tmp_path / "images", tmp_path / "packed"
    make_folder(images)
    flags = [f"--input={images}", f"--output={packed}", "--shard_size=2"]
    stop = (  # a signal while the second shard is being written
        "import sys, runpy, os, signal; from imagegpt_jax.data import folder; read = folder.FolderSource._read\n"
        "def _read(self, file):\n"
        "  if file == 'b/1.jpg': os.kill(os.getpid(), signal.SIGTERM)\n"
        "  return read(self, file)\n"
        "folder.FolderSource._read = _read; runpy.run_module('imagegpt_jax.pack', run_name='__main__')"
    )
    launch = f"import sys; sys.argv = {['pack', *flags]!r}\n{stop}"
    done = subprocess.run([sys.executable, "-c", launch], capture_output=True, text=True)
    assert done.returncode == 130
    shards = [f"train-{i:05d}-of-00003.array_record" for i in range(3)]
    left = {p.name for p in packed.iterdir()}
    assert left >= {shards[0], "plan.json"}
    assert shards[2] not in left
    assert not [name for name in left if name.endswith(".tmp")]
    written = (packed / shards[0]).stat().st_mtime_ns
    pack(*flags)
    assert (packed / shards[0]).stat().st_mtime_ns == written
    assert {p.name for p in packed.iterdir()} == {"dataset.json", *shards}
    assert [r["image"] for r in contents(packed)[1]] == [picture(i) for i in (0, 2, 4, 1, 3)]


def test_webdataset_tars(tmp_path, pack):
    for t in range(2):
        with tarfile.open(tmp_path / f"{t}.tar", "w") as tar:
            for i in range(2):
                key = f"part/{t}{i}"
                add(tar, f"{key}.jpg", picture(i))
                add(tar, f"{key}.txt", f"caption {t}{i}\nanother é".encode())
                add(tar, f"{key}.cls", str(2 * t).encode())
            add(tar, f"j{t}.png", picture(1, "PNG"))
            add(tar, f"j{t}.json", json.dumps({"caption": "from json", "width": 3}).encode())
            add(tar, f"alone{t}.txt", b"no image")
    pack(f"--input={tmp_path}/*.tar", f"--output={tmp_path}/out", "--shard_size=4")
    source, records = contents(tmp_path / "out")
    assert source.label_names == ("0", "1", "2")
    assert [r["id"] for r in records] == ["part/00", "part/01", "j0", "part/10", "part/11", "j1"]
    assert records[4]["captions"] == ["caption 11", "another é"]
    assert records[4]["label"] == 2
    assert records[5]["captions"] == ["from json"]
    assert records[5]["image"] == picture(1, "PNG")


def test_parquet(tmp_path, pack):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def rows(numbers):
        return [
            {"image": {"bytes": picture(i), "path": f"{i}.jpg"}, "text": f"no. {i}", "label": i % 2} for i in numbers
        ]

    about = {"info": {"features": {"label": {"names": ["even", "odd"], "_type": "ClassLabel"}}}}
    for name, numbers in (("a", range(5)), ("b", range(5, 7))):
        table = arrow.Table.from_pylist(rows(numbers)).replace_schema_metadata({"huggingface": json.dumps(about)})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    pack(f"--input={tmp_path}/*.parquet", f"--output={tmp_path}/out", "--shard_size=3")
    source, records = contents(tmp_path / "out")
    assert source.label_names == ("even", "odd")
    assert [(r["id"], r["captions"], r["label"]) for r in records] == [
        (f"{i}.jpg", [f"no. {i}"], i % 2) for i in range(7)
    ]
    assert records[6]["image"] == picture(6)
    links = arrow.table({"URL": ["http://x"], "TEXT": ["x"]})
    parquet.write_table(links, tmp_path / "links.parquet")
    assert "has the columns URL, TEXT" in pack(f"--input={tmp_path}/links.parquet", f"--output={tmp_path}/o2", ok=False)
    assert not (tmp_path / "o2").exists()


def test_tfds_tfrecord(tmp_path, pack):
    from imagegpt_jax.data.tfds_source import import_tfds

    tfds = import_tfds()

    class Pairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            texts = tfds.features.Sequence({"text": tfds.features.Text()})
            features = {
                "image": tfds.features.Image(),
                "captions": texts,
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {"image": picture(i), "captions": [{"text": f"{i}.{j}"} for j in range(2)], "label": i % 3}

    Pairs(data_dir=tmp_path / "tfds", file_format="tfrecord").download_and_prepare()
    pack("--tfds=pairs", f"--data_dir={tmp_path}/tfds", f"--output={tmp_path}/out", "--shard_size=2")
    source, records = contents(tmp_path / "out")
    assert source.label_names == ("0", "1", "2")
    assert sorted((*r["captions"], r["label"]) for r in records) == [(f"{i}.0", f"{i}.1", i % 3) for i in range(5)]
    assert {r["image"] for r in records} == {picture(i) for i in range(5)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=x"], "error: give either --input=FOLDER_OR_PATTERN or --tfds=NAME"),
        (["--input=/nowhere/*.tar", "--output=x"], "--input=/nowhere/*.tar matches nothing"),
        (["--input={tmp}", "--output=x"], "holds .tar files: write --input='{tmp}/*.tar'"),
        (["--input={tmp}/*.tar", "--output=x"], "bad.tar is not a whole tar file"),
        (["--input={tmp}"], "--output is missing"),
    ],
)
def test_bad_flags(tmp_path, pack, flags, message):
    (tmp_path / "bad.tar").write_bytes(b"this is no tar file")
    said = pack(*(f.format(tmp=tmp_path) for f in flags), ok=False)
    assert message.format(tmp=tmp_path) in said
    assert not Path("x").exists()
