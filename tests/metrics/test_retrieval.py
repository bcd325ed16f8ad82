import numpy as np
import pytest
from PIL import Image

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import retrieval


def test_box_downsample_is_the_mean_of_each_block():
    image = np.random.default_rng(0).normal(size=(2, 32, 48, 3))
    expected = image.reshape(2, 16, 2, 16, 3, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(retrieval.box_downsample(image), expected, rtol=1e-12)


@pytest.mark.parametrize("size", [16, 17, 40, 64])
def test_box_downsample_of_any_size_keeps_the_mean_and_agrees_with_pillow(size):
    image = np.random.default_rng(1).uniform(0, 255, (size, size, 1)).astype(np.float32)
    small = retrieval.box_downsample(image)
    assert small.mean() == pytest.approx(image.mean(), rel=1e-6)
    pillow = np.asarray(Image.fromarray(image[..., 0], mode="F").resize((16, 16), Image.Resampling.BOX))
    if size % 16 == 0:  # elsewhere Pillow's box filter counts whole pixels only
        np.testing.assert_allclose(small[..., 0], pillow, rtol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_derangement_moves_everything(count):
    order = retrieval.derangement(count, seed=count)
    assert sorted(order) == list(range(count))
    assert not np.any(order == np.arange(count))


def test_choose_distinct_takes_each_concept_once():
    keys = ["a", "b", "a", "c", "b", "a"] * 3

    def choose(count, seed=0):
        return retrieval.choose_distinct(lambda numbers: [keys[i] for i in numbers], len(keys), count, seed)

    assert sorted(keys[i] for i in choose(3)) == ["a", "b", "c"]
    assert len(choose(10)) == 3
    np.testing.assert_array_equal(choose(3), choose(3))
    np.testing.assert_array_equal(choose(2), choose(3)[:2])
    assert len({tuple(choose(3, seed)) for seed in range(8)}) > 4


def test_choose_distinct_stops_reading_when_it_has_enough():
    read = []

    def keys_of(numbers):
        read.extend(numbers)
        return numbers

    assert len(retrieval.choose_distinct(keys_of, 100_000, 300, seed=0)) == 300
    assert len(read) == 2 * retrieval.CHUNK


def test_perfect_samples_are_all_found_and_shuffled_ones_never():
    references = np.random.default_rng(0).uniform(-1, 1, (20, 32, 32, 3))
    samples = np.repeat(references[:, None], 4, axis=1)
    noisy = samples + np.random.default_rng(1).normal(0, 0.1, samples.shape)
    scores = retrieval.retrieval(noisy, references, seed=0)
    assert scores == {"retrieval_top1": 1.0, "retrieval_top1_shuffled": 0.0, "retrieval_chance": 0.05}


def test_samples_of_other_prompts_are_found_by_the_control():
    references = np.random.default_rng(0).uniform(-1, 1, (10, 32, 32, 3))
    shuffled = retrieval.derangement(10, seed=(3, 4))
    scores = retrieval.retrieval(references[shuffled][:, None], references, seed=3)
    assert scores["retrieval_top1"] == 0.0
    credited = [np.mean(retrieval.derangement(10, seed=(3, i)) == shuffled) for i in range(retrieval.SHUFFLES)]
    assert scores["retrieval_top1_shuffled"] == pytest.approx(np.mean(credited))
    assert np.mean(credited) >= 1 / retrieval.SHUFFLES


def test_a_model_that_ignores_its_prompt_is_at_chance():
    references = np.random.default_rng(0).uniform(-1, 1, (25, 16, 16, 3))
    samples = np.broadcast_to(references[7], (25, 4, 16, 16, 3))
    scores = retrieval.retrieval(samples, references, seed=0)
    assert scores["retrieval_top1"] == scores["retrieval_top1_shuffled"] == scores["retrieval_chance"] == 0.04


def test_one_prompt_is_an_error():
    with pytest.raises(UserError, match="at least 2"):
        retrieval.retrieval(np.zeros((1, 1, 16, 16, 3)), np.zeros((1, 16, 16, 3)), seed=0)
