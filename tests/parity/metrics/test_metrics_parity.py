"""Metrics against torch-fidelity's and clean-fid's functions, on the same features, fewer than dimensions too."""

import types

import numpy as np
import pytest
import torch

from imagegpt_jax.metrics import frechet, kernels, precision_recall, protocols, statistics

pytestmark = pytest.mark.parity


def features(count, size, seed, shift=0.0):
    """Rows like a network's: correlated, skewed, none of them negative; float32."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(size, size)) / np.sqrt(size)
    scale = np.geomspace(1, 0.01, size)
    return (np.abs((rng.normal(size=(count, size)) * scale) @ mix + 0.3 + shift)).astype(np.float32)


def table(rows_ND):
    rows = statistics.Rows(rows_ND.shape[1])
    rows.add(rows_ND)
    return rows


def gaussian(rows_ND):
    moments = statistics.Moments(rows_ND.shape[1])
    moments.add(rows_ND)
    return frechet.Gaussian.of(moments)


# More and fewer examples than dimensions, on both sides and on one.
SIZES = [(400, 300, 64), (40, 30, 64), (40, 200, 64)]


@pytest.fixture(scope="module", params=SIZES, ids=str)
def pair(request):
    n, m, size = request.param
    return types.SimpleNamespace(images=features(n, size, 1, shift=0.05), references=features(m, size, 2))


def test_fid(fidelity, pair):
    metric = fidelity.torch_fidelity.metric_fid
    one, other = (metric.fid_features_to_statistics(torch.from_numpy(f)) for f in (pair.images, pair.references))
    expected = metric.fid_statistics_to_metric(one, other, False)["frechet_inception_distance"]
    ours = frechet.distance(gaussian(pair.images), gaussian(pair.references))
    assert ours == pytest.approx(expected, rel=1e-4)


def test_fid_of_clean_fid(fidelity, pair, monkeypatch):
    # SciPy has dropped the argument by which clean-fid asks for an error estimate.
    linalg = fidelity.cleanfid.fid.linalg
    plain = linalg.sqrtm
    monkeypatch.setattr(linalg, "sqrtm", lambda x, disp=True: plain(x) if disp else (plain(x), 0.0))
    expected = fidelity.cleanfid.fid.fid_from_feats(pair.images.astype(np.float64), pair.references.astype(np.float64))
    ours = frechet.distance(gaussian(pair.images), gaussian(pair.references))
    assert ours == pytest.approx(float(np.real(expected)), rel=1e-3)


@pytest.mark.parametrize(("count", "splits"), [(100, 10), (97, 10), (23, 4)])
def test_inception_score(fidelity, count, splits):
    logits = np.random.default_rng(0).normal(0, 2, (count, 50)).astype(np.float32)
    expected = fidelity.torch_fidelity.metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits, True, 2020)
    protocol = protocols.find("torch_fidelity").with_splits(splits)
    scores = statistics.ClassScores(splits, 50)
    scores.add(logits, statistics.splits_by_number(count, splits, protocol.inception.shuffle_seed))
    assert scores.scores.mean() == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert scores.scores.std() == pytest.approx(expected["inception_score_std"], rel=1e-5)


def test_kid(fidelity, pair):
    size = min(len(pair.images), len(pair.references)) // 2
    expected = fidelity.torch_fidelity.metric_kid.kid_features_to_metric(
        torch.from_numpy(pair.images),
        torch.from_numpy(pair.references),
        kid_subsets=20,
        kid_subset_size=size,
        verbose=False,
    )
    subsets = protocols.find("torch_fidelity").with_subsets(20, size).kid
    ours = kernels.kid(table(pair.images), table(pair.references), subsets)
    assert ours.mean() == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.std() == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)


def test_kid_of_clean_fid(fidelity, pair):
    protocol = protocols.find("clean_fid").with_subsets(20, 25)
    np.random.seed(protocol.kid.seed)  # noqa: NPY002 - clean-fid draws from NumPy's global generator
    expected = fidelity.cleanfid.fid.kernel_distance(
        pair.references.astype(np.float64), pair.images.astype(np.float64), num_subsets=20, max_subset_size=25
    )
    ours = kernels.kid(table(pair.images), table(pair.references), protocol.kid)
    assert ours.mean() == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall(fidelity, pair):
    expected = fidelity.torch_fidelity.metric_prc.prc_features_to_metric(
        torch.from_numpy(pair.images), torch.from_numpy(pair.references), verbose=False, save_cpu_ram=False
    )
    precision, recall = precision_recall.precision_recall(table(pair.images), table(pair.references))
    assert 0 < recall < 1 or 0 < precision < 1
    assert (precision, recall) == (pytest.approx(expected["precision"]), pytest.approx(expected["recall"]))
