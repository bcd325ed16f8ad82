"""The manifest finds every kind of damage, by what it reads and nothing else."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil

import pytest
from etils import epath

from imagegpt_jax.checkpoint import folders
from imagegpt_jax.checkpoint import manifest as manifest_lib
from imagegpt_jax.checkpoint.__main__ import main
from imagegpt_jax.checkpoint.manifest import Damaged, Manifest
from imagegpt_jax.errors import UserError


@pytest.fixture
def workdir(tmp_path):
    for step in (1, 2):
        write_step(tmp_path, step)
    return tmp_path


def write_step(workdir, step, **facts):
    folder = epath.Path(workdir) / "checkpoints" / str(step)
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "state" / "d" / "data").write_bytes(bytes(range(256)) * 40)
    (folder / "state" / "empty").write_bytes(b"")
    (folder / "state" / "small").write_bytes(b"x")
    facts = {"position": 8 * step, "skipped": ((0, 4),), "time": 3600.0 * step} | facts
    return manifest_lib.write(folder, Manifest(step=step, **facts))


def path(workdir, name, step=2):
    return workdir / "checkpoints" / str(step) / name


def flip(file, place=0, bit=0):
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(bytes(data))


DAMAGE = {
    "a flipped bit": lambda w: flip(path(w, "state/d/data"), 5000, 3),
    "a flipped bit of the smallest file": lambda w: flip(path(w, "state/small")),
    "a cut file": lambda w: path(w, "state/d/data").write_bytes(path(w, "state/d/data").read_bytes()[:-1]),
    "an emptied file": lambda w: path(w, "state/small").write_bytes(b""),
    "a filled file": lambda w: path(w, "state/empty").write_bytes(b"\0"),
    "a missing file": lambda w: path(w, "state/small").unlink(),
    "a zeroed file": lambda w: path(w, "state/d/data").write_bytes(bytes(256 * 40)),
    "a file of another name": lambda w: path(w, "state/small").rename(path(w, "state/tiny")),
    "no manifest": lambda w: path(w, "manifest.json").unlink(),
    "a manifest cut off": lambda w: path(w, "manifest.json").write_bytes(path(w, "manifest.json").read_bytes()[:100]),
    "a manifest of zeros": lambda w: path(w, "manifest.json").write_bytes(bytes(500)),
    "a manifest of another shape": lambda w: path(w, "manifest.json").write_text("[]"),
    "the manifest of another step": lambda w: path(w, "manifest.json").write_bytes(
        path(w, "manifest.json", 1).read_bytes()
    ),
}


def test_what_was_written_comes_back(workdir):
    written = write_step(workdir, 3, metrics={"psnr": 20.5}, config={"a": {"b": [1, 2]}}, versions={"jax": "1"})
    assert manifest_lib.check(epath.Path(workdir) / "checkpoints" / "3") == written
    assert set(written.files) == {"state/d/data", "state/empty", "state/small"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_found(damage, workdir):
    folder = epath.Path(workdir) / "checkpoints" / "2"
    manifest_lib.check(folder)
    DAMAGE[damage](workdir)
    with pytest.raises(Damaged):
        manifest_lib.check(folder)


def test_every_bit_of_a_manifest_counts(workdir):
    file = path(workdir, "manifest.json")
    text = file.read_bytes()
    unnoticed = []
    for place in range(len(text)):
        for bit in range(8):
            file.write_bytes(text)
            flip(file, place, bit)
            try:
                read = manifest_lib.read(epath.Path(file).parent)
            except Damaged:
                continue
            unnoticed.append((place, bit, read))
    file.write_bytes(text)
    # White space between the values may change; what is read may not.
    assert all(read == manifest_lib.read(epath.Path(file).parent) for _, _, read in unnoticed)


def test_shares_cover_all_files(workdir):
    folder = epath.Path(workdir) / "checkpoints" / "2"
    flip(path(workdir, "state/small"))
    shares = []
    for share in range(3):
        try:
            manifest_lib.check(folder, (share, 3))
        except Damaged:
            shares.append(share)
    assert len(shares) == 1


@pytest.mark.parametrize(
    ("policy", "gone"),
    [
        ({"keep": 0}, []),
        ({"keep": 2}, [1, 2, 3, 4]),
        ({"keep": 1, "keep_every_hours": 2.0}, [2, 4]),
        ({"keep": 1, "best": "psnr"}, [1, 2, 4, 5]),
        ({"keep": 1, "best": "-psnr"}, [2, 3, 4, 5]),
        ({"keep": 1, "best": "fid"}, [1, 2, 3, 4, 5]),
    ],
)
def test_policies(policy, gone):
    scores = {1: 1.0, 2: 5.0, 3: 9.0, 4: 7.0, 5: 3.0, 6: 4.0}
    steps = [
        Manifest(step=step, position=0, time=3600.0 * step, metrics={"psnr": score}) for step, score in scores.items()
    ]
    assert folders.to_delete(steps, **{"keep_every_hours": 0.0, "best": "", **policy}) == gone


def test_the_binary_lists_verifies_and_repairs(workdir, capsys):
    flip(path(workdir, "state/d/data", 1), 17)
    (workdir / "checkpoints" / "3" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    assert main(["ls", str(workdir)]) == 0
    assert "unfinished" in capsys.readouterr().out
    assert main(["verify", str(workdir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "damaged" in lines[0]
    assert "d/data" in lines[0]
    assert "sound" in lines[1]
    assert main(["repair", str(workdir)]) == 0
    assert folders.numbered(workdir) == [2]
    assert (workdir / "checkpoints" / "damaged" / "1").is_dir()
    capsys.readouterr()
    assert main(["verify", str(workdir)]) == 0


def test_what_is_asked_of_the_binary_is_checked(workdir, capsys):
    for arguments, words in (
        (["ls", "/no/such/run"], "holds no checkpoints"),
        (["verify", str(workdir), "2"], "takes no steps"),
        (["diff", str(workdir), "1", "7"], "no checkpoint of step 7: it has 1, 2"),
        (["diff", str(workdir), "1"], "give two steps"),
    ):
        with pytest.raises(SystemExit) as e:
            main(arguments)
        assert e.value.code == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("gone", range(4))
def test_a_deletion_that_is_cut_off_leaves_no_step(begun, gone, workdir, monkeypatch):
    """However many of its four files are gone: of a checkpoint, and of a save that was cut off before its manifest."""

    class Cut(Exception):
        pass

    step, left = folders.root(workdir) / "2", gone
    if begun:
        (step / manifest_lib.NAME).rename(step / manifest_lib.PENDING)

    def cut(self, missing_ok=False):
        nonlocal left
        for file in sorted(p for p in pathlib.Path(self).rglob("*") if p.is_file()):
            if left == 0:
                raise Cut
            file.unlink()
            left -= 1
        shutil.rmtree(self)

    monkeypatch.setattr(type(epath.Path(workdir)), "rmtree", cut)
    with pytest.raises(Cut):
        folders.delete(workdir, 2)
    assert folders.finished(workdir) == [1]
    assert folders.is_unfinished(step)


def test_a_newer_format_is_refused(workdir):
    file = path(workdir, "manifest.json")
    body = json.loads(file.read_text())
    del body["hash"]
    body["format"] = manifest_lib.FORMAT + 1
    file.write_text(json.dumps({**body, "hash": manifest_lib._hash(body)}))
    with pytest.raises(Damaged, match="newer version"):
        manifest_lib.read(epath.Path(file).parent)


def test_a_manifest_is_complete():
    """Every field is written and read: a new one is not forgotten."""
    assert {f.name for f in dataclasses.fields(Manifest)} == {
        "step", "position", "skipped", "time", "metrics", "evaluated", "config", "versions", "files",
    }  # fmt: skip


def test_only_whole_numbers_are_steps(workdir):
    for name in ("²", "007", "-5", "1.5", "notes"):
        (workdir / "checkpoints" / name).mkdir()
    assert folders.numbered(workdir) == [1, 2]


def test_a_bucket_stays_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(folders.root("gs://bucket/run")) == "gs://bucket/run/checkpoints"
    assert str(folders.root("run")) == str(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, Damaged), (errno.EACCES, UserError), (errno.EMFILE, UserError)]
)
def test_what_says_nothing_about_a_file_is_no_damage(number, kind, workdir, monkeypatch, capsys):
    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(manifest_lib, "hash_file", refuse)
    with pytest.raises(kind, match=rf"cannot be read \({os.strerror(number)}\)"):
        manifest_lib.check(folders.root(workdir) / "2")
    if kind is UserError:
        with pytest.raises(SystemExit):
            main(["repair", str(workdir)])
        assert "error: " in capsys.readouterr().err
        assert folders.numbered(workdir) == [1, 2]  # nothing was set aside


@pytest.mark.parametrize(
    "lie",
    [
        {"files": {"../../secret": [1, "00"]}},
        {"files": {"/etc/hostname": [1, "00"]}},
        {"time": "soon"},
        {"position": [1]},
        {"metrics": {"psnr": "high"}},
        {"files": []},
    ],
)
def test_a_manifest_that_is_sound_and_means_nothing_is_damaged(lie, workdir, capsys):
    file = path(workdir, "manifest.json")
    body = {k: v for k, v in json.loads(file.read_text()).items() if k != "hash"} | lie
    file.write_text(json.dumps({**body, "hash": manifest_lib._hash(body)}))
    with pytest.raises(Damaged, match="not as it was written"):
        manifest_lib.read(epath.Path(file).parent)
    assert main(["ls", str(workdir)]) == 0
    assert "damaged" in capsys.readouterr().out.splitlines()[1]


def test_a_repair_that_cannot_be_written_is_one_sentence(workdir, capsys):
    path(workdir, "state/small").unlink()
    (workdir / "checkpoints" / "damaged").touch()
    with pytest.raises(SystemExit) as e:
        main(["repair", str(workdir)])
    assert e.value.code == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_step_that_lies_elsewhere_is_forgotten_and_stays_there(workdir):
    (workdir / "checkpoints" / "2").rename(workdir / "elsewhere")
    (workdir / "checkpoints" / "2").symlink_to(workdir / "elsewhere")
    assert manifest_lib.check(folders.root(workdir) / "2").step == 2
    folders.delete(workdir, 2)
    assert folders.numbered(workdir) == [1]
    assert (workdir / "elsewhere" / "manifest.json").exists()
