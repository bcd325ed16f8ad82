"""Distances between sets of features, against their definitions and limits; resizing; protocols."""

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import frechet, kernels, precision_recall, protocols, resizing, statistics


def rows(count, size=12, seed=0, shift=0.0):
    return (np.random.default_rng(seed).normal(size=(count, size)) * np.linspace(1, 3, size) + shift).astype(np.float32)


def table(features):
    kept = statistics.Rows(features.shape[1])
    kept.add(features)
    return kept


def gaussian(features):
    moments = statistics.Moments(features.shape[1])
    moments.add(features)
    return frechet.Gaussian.of(moments)


# ------------------------------------------------------------------------------------------------------------- frechet


def test_distance_is_the_formula():
    a, b = gaussian(rows(200, seed=1)), gaussian(rows(150, seed=2, shift=0.3))
    root = scipy.linalg.sqrtm(a.covariance_DD @ b.covariance_DD).real
    step = a.mean_D - b.mean_D
    expected = step @ step + np.trace(a.covariance_DD + b.covariance_DD - 2 * root)
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_distance_of_commuting_gaussians_is_known():
    a = frechet.Gaussian(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = frechet.Gaussian(np.array([1.0, 0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    assert frechet.distance(a, b) == pytest.approx(5 + (2 - 1) ** 2 + 0 + (3 - 1) ** 2)


def test_distance_of_sets_far_smaller_than_their_features():
    """Two points in 500 dimensions: a line each, whose distance is known."""
    one = np.zeros((2, 500), np.float32)
    one[1, 0] = 2.0
    other = np.zeros((2, 500), np.float32)
    other[1, 7] = 4.0
    mean = 1.0**2 + 2.0**2
    assert frechet.distance(gaussian(one), gaussian(other)) == pytest.approx(mean + 2.0 + 8.0, rel=1e-12)
    assert frechet.distance(gaussian(one), gaussian(one)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [0, 100])
def test_distance_of_small_and_correlated_sets_is_exact(scale):
    """Against the singular values of the centred examples, which need no covariance at all."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=300)
    sets = [
        rng.normal(size=(n, 1)) * common * scale + rng.normal(size=(n, 300)) * np.geomspace(1, 1e-3, 300)
        for n in (30, 40)
    ]
    centred = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in sets]
    step = sets[0].mean(axis=0) - sets[1].mean(axis=0)
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = step @ step + sum(np.square(x).sum() for x in centred) - 2 * root
    assert frechet.distance(*map(gaussian, sets)) == pytest.approx(expected, rel=1e-10)


def test_statistics_that_cannot_be_compared():
    a = gaussian(rows(20))
    with pytest.raises(UserError, match="of 12 and 5 features cannot be compared"):
        frechet.distance(a, gaussian(rows(20, size=5)))
    with pytest.raises(UserError, match="not finite"):
        frechet.distance(a, frechet.Gaussian(np.full(12, np.nan), np.eye(12)))


def test_infinity_takes_the_bias_away():
    """Samples of one distribution: the distance of n of them is about c / n, its limit zero."""
    reference = gaussian(rows(20_000, seed=1))
    features = table(rows(1500, seed=2))
    limit, points = frechet.infinity(features, reference, smallest=200)
    sizes, values = zip(*points, strict=True)
    assert (sizes[0], sizes[-1], len(points)) == (200, 1500, 15)
    assert values[0] > values[-1] > 0.01
    assert abs(limit) < values[-1] / 2
    with pytest.raises(UserError, match="needs 20 images, not 10"):
        frechet.infinity(table(rows(10)), reference)


# ------------------------------------------------------------------------------------------------------------- kernels


def test_kid_of_one_distribution_is_zero_on_average():
    same = kernels.kid(table(rows(400, seed=1)), table(rows(400, seed=2)), kernels.Subsets(50, 50))
    other = kernels.kid(table(rows(400, seed=1)), table(rows(400, seed=2, shift=1.0)), kernels.Subsets(50, 50))
    assert abs(same.mean()) < 0.15 * other.mean()
    assert (same < 0).any()  # unbiased: below zero as well
    with pytest.raises(UserError, match="at least 2 images"):
        kernels.kid(table(rows(1)), table(rows(5)), kernels.Subsets())


def test_kid_is_the_unbiased_estimator():
    a, b = rows(7, seed=1).astype(float), rows(7, seed=2).astype(float)
    kernel = [[(x @ y / 12 + 1) ** 3 for y in (*a, *b)] for x in (*a, *b)]
    within = sum(kernel[i][j] + kernel[i + 7][j + 7] for i in range(7) for j in range(7) if i != j) / 42
    across = 2 * sum(kernel[i][j + 7] for i in range(7) for j in range(7)) / 49
    assert kernels.mmd2_unbiased(a, b) == pytest.approx(within - across)
    unlike = 2 * sum(kernel[i][j + 7] for i in range(7) for j in range(7) if i != j) / 42
    assert kernels.mmd2_unbiased(a, b, paired=True) == pytest.approx(within - unlike)
    assert kernels.mmd2_unbiased(a, a, paired=True) == pytest.approx(0, abs=1e-9)
    assert kernels.mmd2_unbiased(a, a) < -0.1


def test_cmmd_is_a_gaussian_kernel_of_directions(monkeypatch):
    a, b = rows(9, seed=1), rows(6, seed=2, shift=2.0)
    expected = 0.0
    for x, y, sign in ((a, a, 1), (b, b, 1), (a, b, -2)):
        x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (x, y))
        square = ((x[:, None] - y) ** 2).sum(-1)
        expected += sign * np.exp(-square / (2 * 10**2)).mean()
    assert kernels.cmmd(table(a), table(b)) == pytest.approx(1000 * expected, rel=1e-5)
    monkeypatch.setattr(statistics, "CHUNK", 4)
    assert kernels.cmmd(table(a), table(b)) == pytest.approx(1000 * expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ manifold


@pytest.mark.parametrize("chunk", [5, 1000])
def test_balls_around_neighbours(monkeypatch, chunk):
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    a, b = rows(23, size=3, seed=1), rows(31, size=3, seed=2, shift=0.7)

    def distances(x, y):
        return np.sqrt(((x[:, None].astype(float) - y) ** 2).sum(-1))

    def radius(x, k):
        return np.sort(distances(x, x), axis=1)[:, k]

    np.testing.assert_allclose(precision_recall.radii(table(a), 3), radius(a, 3) ** 2, rtol=1e-9)
    inside = distances(a, b) <= radius(b, 3)
    back = distances(b, a) <= radius(a, 3)
    assert precision_recall.precision_recall(table(a), table(b)) == (inside.any(1).mean(), back.any(1).mean())
    balls = distances(a, b) < radius(b, 5)
    shares = precision_recall.density_coverage(table(a), table(b))
    np.testing.assert_allclose(shares, (balls.sum() / (5 * 23), balls.any(0).mean()))
    with pytest.raises(UserError, match="needs more than 3 images"):
        precision_recall.precision_recall(table(a), table(b[:3]))


def test_copies_are_neighbours_at_no_distance():
    given = rows(4, size=3)
    np.testing.assert_allclose(precision_recall.radii(table(np.concatenate([given, given])), 1), 0, atol=1e-9)


# ------------------------------------------------------------------------------------------------- resizing, protocols


def test_adm_crops_the_middle_after_halving():
    image = np.random.default_rng(0).integers(0, 256, (70, 100, 3)).astype(np.uint8)
    half = Image.fromarray(image).resize((50, 35), Image.Resampling.BOX)
    scaled = half.resize((round(50 * 32 / 35), 32), Image.Resampling.BICUBIC)
    left = (scaled.width - 32) // 2
    np.testing.assert_array_equal(resizing.adm_center_crop(image, 32), np.asarray(scaled)[:, left : left + 32])
    assert resizing.adm_center_crop(image[:40], 32).shape == (32, 32, 3)


def test_clips_resizing_keeps_the_shape_and_crops():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 255
    cropped = resizing.pil_bicubic_crop(image, 10)
    assert cropped.shape == (10, 10, 3)
    assert cropped[:, 1:-1].min() == 255
    with pytest.raises(UserError, match="unknown resizer 'pil_bicubic'. Did you mean"):
        resizing.to_size("pil_bicubic", 10)


def test_every_protocol_is_complete_and_names_known_things():
    for name, protocol in protocols.PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.resize in resizing.RESIZERS
        assert protocol.about
        assert protocol.reference
        assert bool(protocol.inception.count) != bool(protocol.inception.size)
    with pytest.raises(UserError, match="unknown protocol 'clean-fid'. Did you mean 'clean_fid'"):
        protocols.find("clean-fid")
    given = protocols.find("torch_fidelity")
    assert given.with_subsets(None, None).with_splits(None) == given
    assert protocols.differences(given.facts(), given.with_splits(5).facts()) == [
        "inception: {'count': 10, 'size': 0, 'shuffle_seed': 2020} against"
        " {'count': 5, 'size': 0, 'shuffle_seed': 2020}"
    ]
