import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import reconstruction
from imagegpt_jax.parallel import sharding


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def _evaluate(reconstruct, params, batches, mesh, **options):
    evaluator = reconstruction.ReconstructionEvaluator(reconstruct, lambda: batches, 4, mesh, **options)
    return evaluator.evaluate({"generator": params}, 0)


def _identity(params, images_BHWC):
    codes_Bhw = jnp.round((images_BHWC[:, ::4, ::4, 0] + 1) * 1.5).astype(jnp.int32)
    return images_BHWC + params, codes_Bhw


def _batches(images, batch_size):
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        padding = batch_size - len(part)
        yield {
            "image": np.concatenate([part, np.zeros((padding, *part.shape[1:]), np.float32)]),
            "mask": np.arange(batch_size) < len(part),
        }


def _images(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 0.8, (count, 8, 8, 3)).astype(np.float32)


def test_scores_equal_a_plain_numpy_computation(mesh):
    images = _images(5)
    evaluation = _evaluate(_identity, 0.1, _batches(images, 2), mesh)
    scores, (grid,) = evaluation.scores, evaluation.images["reconstructions"]
    real, fake = (np.round((x.astype(np.float64) + 1) * 127.5) for x in (images, images + np.float32(0.1)))
    psnr = 10 * np.log10(255.0**2 / np.mean((real - fake) ** 2, axis=(1, 2, 3)))
    assert scores["psnr"] == pytest.approx(psnr.mean(), rel=1e-5)
    assert scores["l1"] == pytest.approx(0.1, rel=1e-5)
    assert scores["mse"] == pytest.approx(0.01, rel=1e-5)
    counts = np.bincount(np.round((images[:, ::4, ::4, 0] + 1) * 1.5).astype(int).ravel(), minlength=4)
    p = counts[counts > 0] / counts.sum()
    assert scores["codebook_usage"] == np.mean(counts > 0)
    assert scores["codebook_perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert scores["images"] == 5
    assert grid.shape == (16, 40, 3)
    np.testing.assert_array_equal(grid[:8, 8:16], real[1])
    np.testing.assert_array_equal(grid[8:, 32:], fake[4])


def test_batch_size_and_padding_do_not_matter(mesh):
    images = _images(7, seed=1)
    scores = [_evaluate(_identity, 0.1, _batches(images, b), mesh).scores for b in (2, 3, 7)]
    scores.append(_evaluate(_identity, 0.1, _batches(images, 6), mesh, rows=2).scores)
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-6)


def test_the_worst_pairs_and_the_use_of_codes_are_told(mesh):
    """The first of 23 images differs most from its reconstruction, the last least; batches of three."""
    images = np.zeros((23, 8, 8, 3), np.float32) + (np.arange(23, 0, -1, np.float32) / 50 - 0.5)[:, None, None, None]
    details = _evaluate(_half, 0.0, _batches(images, 3), mesh, num_worst=4).details
    levels = np.round((images + 1) * 127.5).astype(int)
    assert details["worst"].shape == (4, 2, 8, 8, 3)
    np.testing.assert_array_equal(details["worst"][:, 0], levels[:4])
    np.testing.assert_array_equal(details["worst"][:, 1], 64)
    assert (np.diff(details["worst_psnr"]) > 0).all()
    np.testing.assert_allclose(details["worst_psnr"][0], 20 * np.log10(255 / np.abs(levels[0] - 64).mean()), rtol=1e-4)
    np.testing.assert_array_equal(details["counts_K"], [0, 23 * 4, 0, 0])


def _half(params, images_BHWC):
    return jnp.full_like(images_BHWC, -0.5), jnp.ones((len(images_BHWC), 2, 2), jnp.int32)


def test_control_is_the_mean_color(mesh):
    images = _images(4)
    scores = _evaluate(_identity, 0.0, _batches(images, 4), mesh).scores
    assert scores["psnr"] == reconstruction.MAX_PSNR
    levels = np.round((images + 1) * 127.5)
    flat = np.round(levels.mean(axis=(1, 2), keepdims=True))
    expected = (10 * np.log10(255.0**2 / np.mean((levels - flat) ** 2, axis=(1, 2, 3)))).mean()
    assert scores["psnr_mean_color"] == pytest.approx(expected, rel=1e-5)


def test_nothing_outlives_an_evaluator(mesh):
    params = jnp.float32(0.1)

    def reconstruct(params, images_BHWC):
        return _identity(params, images_BHWC)

    evaluator = reconstruction.ReconstructionEvaluator(reconstruct, lambda: _batches(_images(4), 4), 4, mesh)
    evaluator.evaluate({"generator": params}, 0)
    kept = [weakref.ref(reconstruct), weakref.ref(params)]
    assert all(ref() is not None for ref in kept)
    del reconstruct, params, evaluator
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_nothing_to_score_is_an_error(mesh):
    with pytest.raises(UserError, match="empty"):
        _evaluate(_identity, 0.0, [], mesh)
