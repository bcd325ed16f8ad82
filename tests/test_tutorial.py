"""docs/tutorial.md in short: its own commands on twelve photos, as far as needs no long training.

`python tools/docs/walk_tutorial.py --folder=DIR` runs all of it, on 60.
"""

import ast
import importlib.util
import json
import pathlib
import re

import numpy as np
import pytest
from absl import flags

from imagegpt_jax import config as config_lib
from imagegpt_jax.images import to_uint8
from imagegpt_jax.tasks import decoder, input, tokenizer
from imagegpt_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def walk():
    """The tool, as a module."""
    spec = importlib.util.spec_from_file_location("walk_tutorial", ROOT / "tools" / "docs" / "walk_tutorial.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    delattr(flags.FLAGS, "folder")


@pytest.fixture
def photos(walk, tmp_path, monkeypatch):
    """Twelve photos in the working folder."""
    walk.make_photos(tmp_path, 12)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(command):
    """(config, workdir) of a `train` command of the page."""
    values = dict(re.findall(r"--([\w.]+)=(\S+)", command))
    file, _, argument = values.pop("config").partition(":")
    config = config_lib.sibling(str(ROOT / file), pathlib.Path(file).name).get_config(argument)
    for key, text in values.items():
        if key.startswith("config."):
            value = ast.literal_eval(text) if re.fullmatch(r"[\d.]+", text) else text
            config.update_from_flattened_dict({key.removeprefix("config."): value})
    return config, values["workdir"]


def trainings(walk):
    return [parse(command) for command in walk.commands() if command.startswith("imagegpt-jax train ")]


def images(setup, split):
    batches = input.batches(setup, split, batch_size=12)
    batch = next(iter(batches))
    batches.close()
    return to_uint8(batch["image"][batch["mask"]])


def ids(source):
    return {r["id"] for r in source.__getitems__(range(len(source)))}


def test_photos_are_stored_turned(walk, photos):
    from PIL import Image

    stored = [Image.open(path) for path in sorted(photos.glob("photos/*.jpg"))]
    turned = [image for image in stored if image.getexif().get(walk.ORIENTATION) in (3, 6, 8)]
    assert len(turned) >= 3
    assert {path.suffix for path in photos.glob("photos/*.*")} == {".jpg", ".png", ".webp", ".jsonl"}
    assert walk.is_upright(np.asarray(walk.photo(0)[0]))
    assert not any(walk.is_upright(np.asarray(image)) for image in turned if image.getexif()[walk.ORIENTATION] == 3)


def test_the_commands_do_what_the_page_says(walk, photos, capsys):
    (config, workdir), (of_captions, _), (of_classes, _) = trainings(walk)
    steps = ["train", "evaluate", "train", "sample", "train", "sample"]
    assert [command.split()[:2] for command in walk.commands()] == [["imagegpt-jax", step] for step in steps]

    # --- The tokenizer is trained; its first line is what the page shows.
    config.update(steps=2, eval_every=0)
    loop.run(tokenizer.TASK, config, workdir)
    assert "11 of folder:photos: 12 images, captions from metadata files" in capsys.readouterr().err
    setup = tokenizer.setup(config)
    train, validation = ids(setup.sources["train"]), ids(setup.sources["validation"])
    assert len(train) + len(validation) == 12
    assert not train & validation
    for split, count in (("train", 12), ("validation", len(validation))):
        pictures = images(setup, split)
        assert pictures.shape == (count, 32, 32, 3)
        assert all(map(walk.is_upright, pictures))
    stored = json.loads((photos / workdir / "config.json").read_text())["data"]
    assert stored["validation"] == "folder:photos,subset=validation,validation_share=0.05"

    # --- Both decoders take from the data what the page says.
    captions = decoder.setup(of_captions)
    assert ids(captions.sources["validation"]) == validation
    assert captions.config.data.use_labels is False
    assert captions.config.data.text_length == 8
    assert all(prompt.endswith("over a green field") for prompt in captions.config.sample_prompts)
    classes = decoder.setup(of_classes)
    assert classes.labels == walk.SHAPES
    assert (classes.config.data.num_classes, classes.config.data.text_length) == (3, 1)
    names = {r["id"].split("/")[0]: r["label"] for r in classes.sources["train"].__getitems__(range(9))}
    assert names == {name: i for i, name in enumerate(walk.SHAPES)}
