"""What a decoder takes from a folder of pictures when its run begins, and keeps when it goes on."""

import json
import pathlib

import pytest
from PIL import Image

from imagegpt_jax import config as config_lib
from imagegpt_jax.data import holdout
from imagegpt_jax.errors import UserError
from imagegpt_jax.tasks import decoder
from imagegpt_jax.training import summary

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def get_config(folder, **changes):
    config = config_lib.sibling(str(CONFIGS / "x.py"), "decoder.py").get_config("size=test")
    config.update_from_flattened_dict({"data.train": f"folder:{folder}", "data.validation_share": 0.2, **changes})
    return config


def put_photos(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 30), (10 * i, 90, 30)).save(folder / name)


def write_captions(folder, captions):
    rows = ({"file_name": name, "text": text} for name, text in captions.items())
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def photos(tmp_path):
    """Ten photos with captions."""
    names = [f"{i}.jpg" for i in range(10)]
    put_photos(tmp_path / "photos", names)
    write_captions(tmp_path / "photos", {name: f"photo number {i} of a hill" for i, name in enumerate(names)})
    return tmp_path / "photos"


@pytest.fixture
def classes(tmp_path):
    """Twelve photos in three folders."""
    put_photos(tmp_path / "classes", [f"{name}/{i}.png" for name in ("hill", "lake", "sea") for i in range(4)])
    return tmp_path / "classes"


def keep(setup, workdir):
    config_lib.save(setup.config, workdir)
    decoder.TASK.save_assets(setup, workdir)


def test_captions(photos, tmp_path):
    given = get_config(photos, **{"data.max_text_length": 128})
    setup = decoder.setup(given)
    data, longest = (
        setup.config.data,
        max(map(len, setup.text.encode_batch([f"photo number {i} of a hill" for i in range(10)]))),
    )
    assert (data.use_labels, data.num_classes) == (False, 0)
    assert longest <= data.text_length < longest + 4
    assert data.text_length % 4 == 0
    assert setup.layout.text_length == data.text_length
    assert given.data.text_length is None  # the caller's config is left alone
    validation = setup.sources["validation"]
    unseen = {c for r in validation.__getitems__(range(len(validation))) for c in r["captions"]}
    assert 0 < len(setup.config.sample_prompts) <= 2
    assert set(setup.config.sample_prompts) <= unseen
    text = summary.text(decoder.TASK, setup, tmp_path / "run", begins=True)
    assert f"{len(setup.sources['train'])} of folder:{photos}: 10 images, captions from metadata files" in text
    assert f"{data.text_length} places, none cut" in text
    assert "16 x 16 pixels, 4 x 4 codes of 64" in text
    assert f"{8 * 8 / len(setup.sources['train']):.3g} epochs" in text


def test_what_is_cut_is_said(photos):
    setup = decoder.setup(get_config(photos, **{"data.max_text_length": 4}))
    assert setup.config.data.text_length == 4
    assert f"{len(setup.sources['train'])} are cut at 4 (data.text_length)" in dict(setup.notes)["text"]


def test_a_run_that_goes_on_keeps_what_it_took(photos, tmp_path):
    given = get_config(photos, **{"data.max_text_length": 128})
    first = decoder.setup(given)
    keep(first, tmp_path / "run")
    write_captions(
        photos, {f"{i}.jpg": f"another caption, much longer than those before, of photo {i}" for i in range(10)}
    )
    assert (
        decoder.setup(given).config.data.text_length > first.config.data.text_length
    )  # as a new run it would be another
    typed = holdout.resolve(given)
    assert config_lib.check_workdir(typed, tmp_path / "run") == []
    again = decoder.TASK.resume(config_lib.take_stored(typed, tmp_path / "run"), tmp_path / "run")
    assert config_lib.to_dict(again.config) == config_lib.to_dict(first.config)
    assert again.text.fingerprint == first.text.fingerprint


def test_class_folders(classes, tmp_path):
    setup = decoder.setup(get_config(classes))
    data = setup.config.data
    assert (data.use_labels, data.num_classes, data.text_length) == (True, 3, 1)
    assert setup.space.num_classes == 3
    assert setup.space.text_vocab == 0
    assert setup.config.sample_prompts == ("hill", "lake")
    keep(setup, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "labels.json").read_text()) == ["hill", "lake", "sea"]
    loaded = decoder.TASK.setup_for_inference(config_lib.load(tmp_path / "run"), tmp_path / "run")
    assert loaded.space == setup.space
    assert dict(setup.notes)["classes"] == "3: hill, lake, sea"


def test_names_of_the_train_split_number_the_validation_split(classes, tmp_path):
    put_photos(tmp_path / "unseen", ["sea/9.png"])
    setup = decoder.setup(get_config(classes, **{"data.validation": f"folder:{tmp_path / 'unseen'}"}))
    assert setup.sources["validation"].__getitems__([0])[0]["label"] == 2
    put_photos(tmp_path / "unseen", ["river/9.png"])
    with pytest.raises(UserError, match="class 'river'"):
        decoder.setup(get_config(classes, **{"data.validation": f"folder:{tmp_path / 'unseen'}"}))


def test_a_class_that_was_renamed_is_refused_when_a_run_goes_on(classes, tmp_path):
    setup = decoder.setup(get_config(classes))
    keep(setup, tmp_path / "run")
    (classes / "hill").rename(classes / "a_hill")
    with pytest.raises(UserError, match=r"class 'a_hill', which is none .* \(hill, lake, sea\)"):
        decoder.TASK.resume(setup.config, tmp_path / "run")
    (classes / "a_hill").rename(tmp_path / "gone")
    again = decoder.TASK.resume(setup.config, tmp_path / "run")
    assert again.labels == ("hill", "lake", "sea")
    labels = {r["label"] for r in again.sources["train"].__getitems__(range(len(again.sources["train"])))}
    assert labels <= {1, 2}


def test_captions_win_over_classes_and_pictures_alone_say_what_to_do(classes):
    for file in classes.rglob("*.png"):
        file.with_suffix(".txt").write_text(f"a {file.parent.name}")
    assert decoder.setup(get_config(classes)).config.data.use_labels is False
    for file in [*classes.rglob("*.txt")]:
        file.unlink()
    Image.new("RGB", (20, 20)).save(classes / "alone.png")
    with pytest.raises(UserError, match="have no caption"):
        decoder.setup(get_config(classes))
