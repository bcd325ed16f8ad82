"""Every size and recipe starts on data of its kind: the whole set-up that `train` runs, with shapes for arrays.

What is compiled and counted ahead of time goes around the data; here both must give the same network.
"""

import io
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image

from imagegpt_jax import config as config_lib
from imagegpt_jax.data import sources
from imagegpt_jax.data import text as text_lib
from imagegpt_jax.tasks import decoder, tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORDS = ("a", "red", "heart", "dog", "face", "of", "noto", "emoji")


def module(name):
    return config_lib.sibling(str(ROOT / "configs" / "x.py"), f"{name}.py")


class Made:
    """Eight records of what a preset trains on."""

    def __init__(self, kinds, grid=(1, 1), label_names=()):
        buffer = io.BytesIO()
        Image.new("RGB", (300, 280), (200, 40, 40)).save(buffer, "JPEG")
        record = {"image": buffer.getvalue(), "codes": np.zeros(grid[0] * grid[1], np.int32), "grid": grid, "label": 3}
        self.name, self.label_names, self.fingerprint = "made", label_names, "0"
        self._records = [
            {"id": str(i), "captions": [f"{' '.join(WORDS[: i + 1])}"], **record} for i in range(len(WORDS))
        ]
        self._records = [{key: r[key] for key in ("id", *kinds)} for r in self._records]

    def __len__(self):
        return len(self._records)

    def __getitems__(self, indices):
        return [self._records[i] for i in indices]


@pytest.fixture
def start(monkeypatch):
    """Sets a task up on made data."""

    def setup(task, config, source):
        monkeypatch.setitem(sources.KINDS, "made", (lambda split: source, "made:train"))
        config.data.train, config.data.validation = "made:train", "made:validation"
        return task.setup(config)

    return setup


def trace(task, setup):
    state = jax.eval_shape(lambda key: task.init_state(setup, key), jax.eval_shape(jax.random.key, 0))
    batch = task.abstract_batch(setup, setup.config.batch_size)
    phase = task.TASK.phases(setup)[-1]
    after, values = jax.eval_shape(lambda s, b: task.train_step(setup, phase, s, b), state, batch)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert "loss" in values


def text_encoder(folder):
    shutil.copytree(ROOT / "tests" / "golden" / "weights" / "gpt2", folder)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate((*WORDS, "?"))}, unk_token="?")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text_lib.TextTokenizer(words).save(folder)
    return str(folder)


DECODERS = [f"size={size}" for size in module("decoder").MODELS]
DECODERS += [f"recipe={recipe}" for recipe in config_lib.sibling(str(ROOT / "configs" / "x.py"), "recipes.py").RECIPES]


@pytest.mark.parametrize("arguments", DECODERS)
def test_a_decoder_starts(arguments, start, tmp_path):
    config = module("decoder").get_config(arguments)
    kinds, names = ["codes", "grid"], ()
    if config.data.use_labels:
        kinds, names = [*kinds, "label"], tuple(f"class {i}" for i in range(1000))  # and no captions, as ImageNet
    elif config.model.feature_width or config.data.text_vocab_size:
        kinds.append("captions")
    if config.model.feature_width:
        config.text_encoder, config.model.feature_width = text_encoder(tmp_path / "gpt2"), 0
        config.model.feature_length = config.data.text_length = 12
    setup = start(decoder, config, Made(kinds, tuple(config.data.grid), names))
    assert setup.space.num_classes == len(names)
    if "captions" in kinds:
        trace(decoder, setup)
    else:
        assert setup.model == decoder.setup_abstract(config).model
        assert setup.layout == decoder.setup_abstract(config).layout


TOKENIZERS = [f"size={size}" for size in module("tokenizer").MODELS]
TOKENIZERS += [f"recipe={recipe}" for recipe in module("tokenizer").RECIPES]


@pytest.mark.parametrize("arguments", TOKENIZERS)
def test_a_tokenizer_starts(arguments, start):
    config = module("tokenizer").get_config(arguments)
    config.loss.lpips = 0.0  # whose weights are not in the box
    config.loss.l1 = 1.0
    setup = start(tokenizer, config, Made(["image"]))
    assert setup.model == tokenizer.setup_abstract(config).model
