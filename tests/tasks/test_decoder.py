"""The decoder's batches and loss against plain definitions."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from imagegpt_jax import config as config_lib
from imagegpt_jax.data import packing
from imagegpt_jax.errors import UserError
from imagegpt_jax.models import gpt
from imagegpt_jax.parallel import sharding
from imagegpt_jax.tasks import decoder
from imagegpt_jax.tasks.decoder.batches import orders as orders_of
from imagegpt_jax.tasks.decoder.batches import pack, random_share
from imagegpt_jax.tasks.decoder.train_step import token_nll
from imagegpt_jax.train_state import flatten

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def get_config(**changes):
    config = config_lib.sibling(str(CONFIGS / "x.py"), "decoder.py").get_config("size=test")
    for key, value in changes.items():
        config.update_from_flattened_dict({key: value})
    return config


@pytest.fixture(scope="module")
def setup():
    return decoder.setup(get_config(**{"data.image_to_text": 0.5}))


@pytest.fixture(scope="module")
def batch(setup):
    """A batch with both directions and some dropped texts."""
    stream = decoder.batches(setup, "train", batch_size=32)
    batch = next(stream)
    stream.close()
    assert 5 < (batch["tokens"][:, 0] == setup.space.boi).sum() < 27
    return batch


@pytest.fixture(scope="module")
def state(setup):
    return decoder.init_state(setup, jax.random.key(0))


def test_codes_made_in_the_step_are_those_that_packing_would_place(setup, batch, state):
    arrays = {k: jnp.asarray(v) for k, v in batch.items()}
    prepared = decoder.prepare_batch(setup, state, arrays)
    tokenizer = setup.networks["tokenizer"].module(state.params("tokenizer"))
    codes = np.asarray(tokenizer.encode_codes(arrays["image"]))

    stream = decoder.batches(setup, "train", batch_size=32)
    raw = None
    original = setup.layout.pack

    def spy(texts, labels, _, directions, drops, orders):
        nonlocal raw
        assert orders is None
        packed = original(texts, labels, codes, directions, drops)
        raw = packed if raw is None else raw  # the pipeline runs ahead
        return packed

    object.__setattr__(setup.layout, "pack", spy)
    next(stream)
    stream.close()
    object.__delattr__(setup.layout, "pack")
    assert raw is not None, "nothing was packed"
    for name in ("tokens", "targets", "positions", "segments", "kind", "weights"):
        np.testing.assert_array_equal(np.asarray(prepared[name]), raw[name])


def test_likelihood_is_the_softmax_over_the_ids_of_the_targets_kind(setup, batch, state):
    arrays = decoder.prepare_batch(setup, state, {k: jnp.asarray(v) for k, v in batch.items()})
    module = setup.networks["decoder"].module(state.params("decoder"))
    nll = np.asarray(token_nll(setup, module, arrays))

    logits = np.asarray(module(gpt.Sequence.from_batch(arrays)).logits, np.float64)
    first = setup.space.image_start
    kind, targets = np.asarray(arrays["kind"]), np.asarray(arrays["targets"])
    for b, position in zip(*np.nonzero(kind), strict=True):
        scores, target = logits[b, position], targets[b, position]
        scores = scores[first:] if kind[b, position] == packing.IMAGE else scores[:first]
        target = target - first if kind[b, position] == packing.IMAGE else target
        expected = np.log(np.exp(scores).sum()) - scores[target]
        np.testing.assert_allclose(nll[b, position], expected, rtol=2e-5)
    assert (nll[kind == packing.NONE] == 0).all()


def test_loss_is_weighted_by_kind(setup, batch, state):
    arrays = decoder.prepare_batch(setup, state, {k: jnp.asarray(v) for k, v in batch.items()})
    module = setup.networks["decoder"].module(state.params("decoder"))
    nll = np.asarray(token_nll(setup, module, arrays))
    _, values = decoder.train_step(setup, "train", state, arrays)
    image, text = (np.asarray(arrays["kind"]) == k for k in (packing.IMAGE, packing.TEXT))
    weight = setup.config.data.text_weight
    expected = (nll[image].sum() + weight * nll[text].sum()) / (image.sum() + weight * text.sum())
    np.testing.assert_allclose(values["loss"].compute(), expected, rtol=1e-5)
    np.testing.assert_allclose(values["image_bits_per_token"].compute(), nll[image].mean() / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(values["text_bits_per_token"].compute(), nll[text].mean() / np.log(2), rtol=1e-5)


def test_accumulated_parts_make_the_step_of_the_whole_batch(batch):
    """Parts with unequal numbers of words count by what they hold, not each the same."""
    assert len({(kinds == packing.TEXT).sum() for kinds in np.split(batch["kind"], 4)}) > 1
    changes = {"model.dtype": "float64", "model.param_dtype": "float64", "ema_decay": 0.9, "optim.warmup_steps": 0}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    with jax.enable_x64():
        steps = []
        for count in (1, 4):
            setup = decoder.setup(get_config(accumulate=count, **{"data.image_to_text": 0.5, **changes}))
            state = decoder.init_state(setup, jax.random.key(0))
            arrays = decoder.prepare_batch(setup, state, {k: jnp.asarray(v) for k, v in batch.items()})
            steps.append(decoder.train_step(setup, "train", state, arrays))
        (whole, whole_values), (parts, parts_values) = steps
        for name in ("trainable", "ema"):
            jax.tree.map(close, getattr(whole, name), getattr(parts, name))
        assert whole_values.keys() == parts_values.keys()
        for name in whole_values:
            close(whole_values[name].compute(), parts_values[name].compute())
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), whole.trainable, state.trainable)
        assert min(jax.tree.leaves(moved)) > 1e-6


def test_draws_of_an_example_depend_on_its_position_alone(setup, batch):
    tail = decoder.batches(setup, "train", batch_size=8, position=16)
    again = next(tail)
    tail.close()
    for name in ("tokens", "segments", "kind"):
        np.testing.assert_array_equal(again[name], batch[name][16:24])


def test_guidance_dropout_and_directions_have_their_shares(setup):
    count = 4000
    plain = {"position": np.arange(count), "caption": np.array(["a red heart"] * count, object)}
    packed = pack(setup, plain, train=True)
    reverse = packed["tokens"][:, 0] == setup.space.boi
    empty = packed["tokens"][:, 0] == setup.space.pad
    assert reverse.mean() == pytest.approx(0.5, abs=0.03)
    assert empty[~reverse].mean() == pytest.approx(setup.config.data.guidance_dropout, abs=0.02)
    evaluated = pack(setup, plain, train=False)
    assert not (evaluated["tokens"][:, 0] == setup.space.boi).any()
    assert not (evaluated["tokens"][:, 0] == setup.space.pad).any()


def test_labels_can_take_the_place_of_captions():
    setup = decoder.setup(get_config(**{"data.use_labels": True, "data.text_length": 1}))
    assert setup.space.num_classes == len(setup.labels) == 9
    packed = pack(
        setup, {"position": np.arange(3), "label": np.array([0, 4, 8]), "caption": np.array(["x"] * 3)}, train=False
    )
    np.testing.assert_array_equal(packed["tokens"][:, 0], setup.space.class_start + np.array([0, 4, 8]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": "/no/such/run"}, "/no/such/run"),
        ({"tokenizer": ""}, r"encodes the images of emoji:\S+ .*tokenizer=WORKDIR.*--config.tokenizer=untrained"),
        ({"data.text_tokenizer": "/no/such/folder"}, "/no/such/folder"),
        ({"data.text_vocab_size": 10}, "text_vocab_size=10"),
        ({"model.kv_heads": 3}, "kv_heads=3"),
        ({"data.train": "emoji:trian"}, "Did you mean 'train'"),
    ],
)
def test_configs_that_cannot_work_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        decoder.setup(get_config(**changes))


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor", "shampoo"])
def test_every_optimizer_trains_what_is_not_frozen(name):
    setup = decoder.setup_abstract(get_config(**{"frozen": ("^embed", "attention"), "optim.name": name}))
    made = jax.eval_shape(lambda key: decoder.init_state(setup, key), jax.random.key(0))
    assert not {"embed", "attention"} & {word for path in flatten(made.trainable) for word in path.split("/")}
    assert made.frozen["decoder"]["embed"]
    params = made.trainable["decoder"]
    updates, _ = jax.eval_shape(setup.optimizers["decoder"].update, params, made.opt["decoder"], params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_a_mesh_that_does_not_divide_heads_or_width_is_refused_before_compilation():
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 4), sharding.MESH_AXES)
    with pytest.raises(UserError, match="model.heads=2 does not divide over mesh.tensor=4: use mesh.tensor=1 or 2"):
        decoder.check_mesh(decoder.setup(get_config()), mesh)
    wide = {"model.heads": 4, "model.width": 30, "model.head_dim": 8}
    with pytest.raises(UserError, match="model.width=30 does not divide over mesh.tensor=4"):
        decoder.check_mesh(decoder.setup(get_config(**wide)), mesh)


def test_grid_that_does_not_fit_the_images_is_refused(setup, batch, state):
    other = dataclasses.replace(setup, layout=dataclasses.replace(setup.layout, grid=(2, 8)))
    arrays = {k: jnp.asarray(v) for k, v in batch.items()}
    with pytest.raises(UserError, match="16 x 16 pixels give"):
        decoder.prepare_batch(other, state, arrays)


def test_evaluation_scores_the_split_and_draws_the_same_pictures_every_time(setup, state):
    mesh = sharding.make_mesh(setup.config.mesh)
    with jax.set_mesh(mesh):
        likelihoods, grid = decoder.TASK.evaluators(setup, mesh)
        params = {name: state.eval_params(name) for name in setup.networks}
        scores, again = (likelihoods.evaluate(params, step).scores for step in (0, 1))
        images, same = (grid.evaluate(params, step).images for step in (0, 1))
    assert scores == again
    assert scores["validation/image_tokens"] == len(setup.sources["validation"]) * setup.layout.num_codes
    # An untrained model predicts each of the 64 codes alike.
    assert scores["validation/image_bits_per_token"] == pytest.approx(6, abs=0.2)
    assert images["samples"].dtype == np.uint8
    assert images["samples"].std() > 0
    np.testing.assert_array_equal(images["samples"], same["samples"])


# --------------------------------------------------------------------------------------------------- random order


@pytest.fixture(scope="module")
def random_setup():
    changes = {"data.image_to_text": 0.3, "model.target_positions": True}
    return decoder.setup(get_config(**changes, **{"data.order.random_until": 4, "data.order.raster_from": 8}))


def test_random_orders_anneal_to_raster(random_setup):
    """All sequences before step 4, half of them at step 6, none from step 8 on; batches are of 8."""
    share = random_share(random_setup, np.array([0, 8 * 4 - 1, 8 * 4, 8 * 6, 8 * 7, 8 * 8, 10**6]))
    np.testing.assert_allclose(share, [1, 1, 1, 0.5, 0.25, 0, 0])
    raster = np.arange(random_setup.layout.num_codes)
    for step, expected in ((0, 0.0), (6, 0.5), (8, 1.0)):
        wide = dataclasses.replace(random_setup, config=ConfigDict(random_setup.config.to_dict()))
        wide.config.batch_size = 4000
        orders = orders_of(wide, 4000 * step + np.arange(4000))
        assert np.all(np.sort(orders, axis=1) == raster)
        assert np.mean(np.all(orders == raster, axis=1)) == pytest.approx(expected, abs=0.03)


def test_each_place_is_as_often_the_first(random_setup):
    orders = orders_of(random_setup, np.arange(32))
    np.testing.assert_array_equal(orders, orders_of(random_setup, np.arange(64))[:32])  # of the position alone
    wide = dataclasses.replace(random_setup, config=ConfigDict(random_setup.config.to_dict()))
    wide.config.batch_size = 8000
    counts = np.bincount(orders_of(wide, np.arange(8000))[:, 0], minlength=16)
    assert np.all(np.abs(counts - 500) < 5 * np.sqrt(500))


def test_codes_made_in_the_step_stand_in_their_sequences_order(random_setup):
    stream = decoder.batches(random_setup, "train", batch_size=16)
    batch = next(stream)
    stream.close()
    reverse = batch["tokens"][:, 0] == random_setup.space.boi
    assert 0 < reverse.sum() < 16
    state = decoder.init_state(random_setup, jax.random.key(0))
    prepared = decoder.prepare_batch(random_setup, state, {k: jnp.asarray(v) for k, v in batch.items()})
    tokenizer = random_setup.networks["tokenizer"].module(state.params("tokenizer"))
    ids = (
        np.asarray(tokenizer.encode_codes(jnp.asarray(batch["image"]))).reshape(16, 16) + random_setup.space.image_start
    )
    length = random_setup.layout.text_length
    for b in range(16):
        start = 1 if reverse[b] else length + 1
        places = batch["positions"][b, start : start + 16, 1:] - batch["positions"][b, start : start + 16, 1:].min(0)
        raster = places @ [4, 1]  # where each code stands, from its position
        assert reverse[b] == np.array_equal(raster, np.arange(16))
        np.testing.assert_array_equal(prepared["tokens"][b, start : start + 16], ids[b][raster])
        np.testing.assert_array_equal(prepared["targets"][b, start - 1 : start + 15], ids[b][raster])
        np.testing.assert_array_equal(
            batch["target_positions"][b, start - 1 : start + 15], batch["positions"][b, start : start + 16]
        )


def test_random_orders_need_target_positions():
    with pytest.raises(UserError, match="model.target_positions=True"):
        decoder.setup(get_config(**{"data.order.raster_from": 8}))
    with pytest.raises(UserError, match="must not be before"):
        decoder.setup(
            get_config(**{"data.order.random_until": 9, "data.order.raster_from": 8, "model.target_positions": True})
        )
