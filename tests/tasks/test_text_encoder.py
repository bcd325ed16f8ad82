"""A decoder over a frozen language model that reads the words: trained, scored and sampled."""

import functools
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import imagegpt_jax as ig
from imagegpt_jax import config as config_lib
from imagegpt_jax import images
from imagegpt_jax.data import text as text_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt import plain_sequence
from imagegpt_jax.sampling import batching
from imagegpt_jax.sampling.jobs import image_job
from imagegpt_jax.sampling.likelihood import log_likelihood
from imagegpt_jax.sampling.settings import Sampling
from imagegpt_jax.tasks import decoder
from imagegpt_jax.tasks.decoder.batches import pack
from imagegpt_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "weights"
PROMPTS = ["red heart", "", "dog face of a cat", "dog"]
LENGTH = 5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A GPT-2 of random numbers with a tokenizer of words beside its weights."""
    folder = tmp_path_factory.mktemp("encoder") / "gpt2"
    words = ["noto", "emoji", "of", "red", "heart", "dog", "face", "cat", "a"]
    ids = {word: i for i, word in enumerate([*words, "[UNK]"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    shutil.copytree(GOLDEN / "gpt2", folder)
    text_lib.TextTokenizer(tokenizer).save(folder)
    return folder


def get_config(encoder, **changes):
    config = config_lib.sibling(str(ROOT / "configs" / "x.py"), "decoder.py").get_config("size=test")
    config.update_from_flattened_dict({
        "data.train": "emoji:validation,res=16,styles=noto", "data.validation": "emoji:validation,res=16,styles=noto",
        "text_encoder": str(encoder), "data.text_length": LENGTH, "data.guidance_dropout": 0.5, "steps": 2,
        "eval_every": 2, "log_every": 1, "checkpoint.every": 1, "sample_prompts": (), **changes,
    })  # fmt: skip
    return config


@pytest.fixture(scope="module")
def run(encoder, tmp_path_factory):
    """A training of two steps, as `imagegpt_jax.train` does it."""
    workdir = tmp_path_factory.mktemp("run")
    config = get_config(encoder)
    state = loop.run(decoder.TASK, config, workdir)
    return types.SimpleNamespace(workdir=workdir, config=config, state=state, gpt=ig.load_decoder(workdir))


def test_features_of_a_batch_are_the_states_of_the_language_model(run, encoder):
    setup = decoder.setup(run.config)
    assert (setup.layout.text_length, setup.space.text_vocab) == (0, 0)
    assert (setup.model.feature_length, setup.model.feature_width) == (LENGTH, 16)
    stream = decoder.batches(setup, "train", batch_size=16)
    batch = next(stream)
    stream.close()
    assert {name: x.shape for name, x in decoder.abstract_batch(setup, 16).items()} == {
        name: x.shape for name, x in batch.items() if name != "mask"
    }
    prepared = jax.jit(functools.partial(decoder.prepare_batch, setup))(run.state, batch)
    dropped = ~batch["prompt_mask"].any(1)
    assert 1 < dropped.sum() < 15  # guidance dropout: rows without a word
    gpt = ig.load_decoder(encoder)
    for row in np.flatnonzero(~dropped)[:2]:
        ids = batch["prompt_tokens"][row][batch["prompt_mask"][row]]
        alone = gpt(plain_sequence(jnp.asarray(ids)[None])).hidden[0]
        np.testing.assert_allclose(prepared["features"][row, LENGTH - len(ids) :], alone, atol=1e-5)
        assert not np.asarray(prepared["features"][row, : LENGTH - len(ids)]).any()
    plain = pack(setup, {"position": np.arange(4), "caption": np.array(PROMPTS, object)}, train=False)
    np.testing.assert_array_equal(plain["prompt_mask"].sum(1), [2, 0, 5, 1])
    assert plain["prompt_mask"][0].tolist() == [False] * 3 + [True] * 2


def test_without_a_length_there_are_as_many_features_as_may_be(encoder, tmp_path):
    given = get_config(encoder, **{"data.text_length": None, "data.max_text_length": 7})
    setup = decoder.setup(given)
    assert (setup.config.data.text_length, setup.model.feature_length, setup.layout.text_length) == (7, 7, 0)
    decoder.TASK.save_assets(setup, tmp_path)
    config_lib.save(setup.config, tmp_path)
    assert decoder.TASK.resume(config_lib.take_stored(given, tmp_path), tmp_path).model.feature_length == 7
    assert decoder.setup_abstract(given).model.feature_length == 7


def test_training_trains_what_reads_the_features_and_nothing_of_the_encoder(run, encoder):
    scores = {}
    for line in (run.workdir / "metrics.jsonl").read_text().splitlines():
        scores |= json.loads(line)
    assert np.isfinite(scores["validation/image_bits_per_token"])
    first = ig.load_decoder(run.workdir, 1).gpt.features
    for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(run.gpt.gpt.features), strict=True):
        assert np.abs(np.asarray(before) - np.asarray(after)).max() > 0
    assert not jax.tree.leaves(run.state.trainable["encoder"])
    assert run.gpt.setup.encoder.folder == str(encoder)
    jax.tree.map(np.testing.assert_array_equal, run.state.frozen["encoder"], run.gpt.setup.encoder.params())


def test_pictures_follow_the_words(run):
    gpt, tok = run.gpt, run.gpt.load_tokenizer()
    greedy = Sampling(temperature=0.0, cfg_scale=3.0)
    how = {"temperature": 0.0, "cfg_scale": 3.0, "batch_size": 4}
    features = gpt.read(PROMPTS)
    job = image_job(gpt.setup.layout, [([[]] * 4, None)], greedy, features=[features])
    expected = batching.run(gpt.gpt, job, greedy, batch_size=4).tokens
    pictures = ig.generate(gpt, tok, PROMPTS, **how)
    np.testing.assert_array_equal(pictures, images.to_uint8(tok.decode(expected)))
    assert (ig.generate(gpt, tok, PROMPTS[:1], negative="dog", **how) != pictures[:1]).any()

    # Of two prompts that are mixed each has its own features, and guidance those of the negative prompt.
    two, away = [tuple(x[i : i + 1] for x in features) for i in (0, 2)], tuple(x[3:] for x in features)
    prompts = [([[]], None)] * 2
    job = image_job(gpt.setup.layout, prompts, greedy, mix=np.full((1, 2), 0.5), features=two, negative_features=away)
    for packed, (values, mask) in zip((*job.prompts, job.without), (*two, away), strict=True):
        np.testing.assert_array_equal(packed["features"], values)
        np.testing.assert_array_equal(packed["feature_mask"], mask)


def test_likelihood_is_that_of_the_words(run):
    gpt, tok = run.gpt, run.gpt.load_tokenizer()
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    scores = ig.rank_captions(gpt, tok, pictures, PROMPTS)
    seen = gpt.read(PROMPTS[2:3])
    one = log_likelihood(gpt.gpt, gpt.setup.layout, [[]], None, tok.encode(pictures[:1]), features=seen)
    np.testing.assert_allclose(scores[0, 2], one[0], rtol=1e-5)
    assert len(np.unique(scores[0])) == 4
    with pytest.raises(UserError, match="writes no words"):
        ig.rank_captions(gpt, tok, pictures, PROMPTS, of="text")


def test_another_encoder_may_take_its_place_and_must_fit(run, encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "moved")
    moved = ig.load_decoder(run.workdir, text_encoder=tmp_path / "moved")
    np.testing.assert_array_equal(moved.read(PROMPTS)[0], run.gpt.read(PROMPTS)[0])
    assert moved.fingerprint() == run.gpt.fingerprint()
    path = tmp_path / "moved" / "model.safetensors"
    weights = bytearray(path.read_bytes())
    weights[-3] ^= 16  # a bit of one number of the language model
    path.write_bytes(weights)
    assert ig.load_decoder(run.workdir, text_encoder=tmp_path / "moved").fingerprint() != run.gpt.fingerprint()
    with pytest.raises(UserError, match="for decoders with places for features, and this one has none"):
        ig.load_decoder(GOLDEN / "imagegpt", text_encoder=encoder)
    with pytest.raises(UserError, match="comes without a text tokenizer"):
        ig.load_decoder(run.workdir, text_encoder=GOLDEN / "gpt2")


def test_features_are_as_exact_as_the_decoder(encoder):
    """In float64 a run is the same on every mesh to 1e-9, which it would not be with features of float32."""
    exact = dict.fromkeys(("model.dtype", "model.param_dtype", "optim.mu_dtype", "optim.nu_dtype"), "float64")
    with jax.enable_x64():
        setup = decoder.setup_abstract(get_config(encoder, **exact))
        state = jax.eval_shape(lambda: decoder.init_state(setup, jax.random.key(0)))
        made = jax.eval_shape(lambda s, b: decoder.prepare_batch(setup, s, b), state, decoder.abstract_batch(setup, 2))
    assert made["features"].dtype == jnp.float64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_encoder": ""}, r"feature_width=7 needs features of the words.*--config.text_encoder=FOLDER"),
        ({}, r"states of 16 numbers, and the decoder reads features of 7: set --config.model.feature_width=16"),
        ({"model.feature_width": 0, "data.text_length": 99}, "knows 16 positions, and prompts have 99"),
        ({"model.feature_width": 0, "text_encoder": "/no/such"}, "text_encoder=/no/such holds no weights"),
        ({"model.feature_width": 0, "data.image_to_text": 0.5}, "writes no captions: set data.image_to_text=0"),
    ],
)
def test_what_cannot_work_is_refused(encoder, changes, words):
    with pytest.raises(UserError, match=words):
        decoder.setup(get_config(encoder, **{"model.feature_width": 7, **changes}))
