import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import likelihood
from imagegpt_jax.parallel import sharding

VOCAB = 16


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def _evaluate(score, params, batches, mesh, **options):
    evaluator = likelihood.LikelihoodEvaluator(score, lambda: batches, VOCAB, mesh, **options)
    return evaluator.evaluate({"decoder": params}, 0).scores


def _unigram(params, batch):
    return -jnp.take(jax.nn.log_softmax(params["decoder"]), batch["targets"]), batch["targets"]


def _batch(targets, kind, weights, mask=None):
    targets = np.asarray(targets, np.int32)
    rows = np.asarray(mask if mask is not None else [True] * len(targets))
    return {
        "tokens": targets,
        "positions": np.zeros((*targets.shape, 3), np.int32),
        "segments": np.ones_like(targets),
        "targets": targets,
        "weights": np.asarray(weights, np.float32),
        "kind": np.asarray(kind, np.int8),
        "condition": np.zeros(len(targets), np.int32),
        "mask": rows,
    }


def test_uniform_model_scores_log2_of_the_vocabulary(mesh):
    batch = _batch([[1, 2, 3, 4]], [[1, 1, 2, 2]], [[1, 1, 1, 1]])
    scores = _evaluate(_unigram, jnp.zeros(VOCAB), [batch], mesh)
    assert scores["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert scores["text_bits_per_token"] == pytest.approx(4.0, rel=1e-6)
    assert scores["image_bits_per_token"] == pytest.approx(4.0, rel=1e-6)


def test_the_best_unigram_model_scores_exactly_the_control(mesh):
    rng = np.random.default_rng(0)
    targets = rng.choice(4, (3, 32), p=[0.5, 0.25, 0.15, 0.1])
    batch = _batch(targets, np.full((3, 32), 2), np.ones((3, 32)))
    frequencies = np.bincount(targets.ravel(), minlength=VOCAB) / targets.size
    logits = jnp.log(jnp.asarray(frequencies) + 1e-30)
    scores = _evaluate(_unigram, logits, [batch], mesh)
    assert scores["image_bits_per_token"] == pytest.approx(scores["unigram_image_bits_per_token"], rel=1e-5)
    assert "text_bits_per_token" not in scores
    assert scores["image_tokens"] == 96


def test_weights_zero_and_masked_rows_do_not_count(mesh):
    def nll(params, batch):
        return batch["targets"].astype(jnp.float32), batch["targets"]

    batches = [
        _batch([[1, 2, 9], [3, 4, 9]], [[1, 2, 2], [1, 2, 0]], [[0.5, 2, 0], [0.5, 2, 0]]),
        _batch([[5, 6, 9], [8, 8, 8]], [[1, 2, 2], [1, 2, 2]], [[0.5, 2, 0], [1, 1, 1]], mask=[True, False]),
    ]
    scores = _evaluate(nll, 0.0, batches, mesh)
    for rows in (1, 2):  # of a device at once
        assert _evaluate(nll, 0.0, batches, mesh, rows=rows) == scores
    named = _evaluate(nll, 0.0, batches, mesh, prefix="validation/")
    assert named == {f"validation/{name}": value for name, value in scores.items()}
    assert scores["text_bits_per_token"] == pytest.approx(3 / math.log(2))
    assert scores["image_bits_per_token"] == pytest.approx(4 / math.log(2))
    assert scores["loss"] == pytest.approx((0.5 * 9 + 2 * 12) / 7.5)
    assert (scores["text_tokens"], scores["image_tokens"]) == (3, 3)
    assert scores["unigram_text_bits_per_token"] == pytest.approx(math.log2(3))


def test_nothing_to_score_is_an_error(mesh):
    with pytest.raises(UserError, match="empty"):
        _evaluate(_unigram, jnp.zeros(VOCAB), [], mesh)


def test_targets_may_be_made_on_the_device(mesh):
    """As where images are encoded within the program: then the batch's own targets are placeholders."""

    def score(params, batch):
        targets_BL = batch["positions"][..., 0]
        return jnp.ones(targets_BL.shape), targets_BL

    batch = _batch([[0, 0, 0, 0]], [[2, 2, 2, 2]], [[1, 1, 1, 1]])
    batch["positions"][..., 0] = [1, 2, 3, 4]
    assert _evaluate(score, 0.0, [batch], mesh)["unigram_image_bits_per_token"] == pytest.approx(2.0)
