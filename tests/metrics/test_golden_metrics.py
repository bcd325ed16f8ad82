"""Metrics and the FID Inception against what torch-fidelity made of the same inputs, without PyTorch.

`tools/golden/update_golden_metrics.py` writes the file.
"""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from imagegpt_jax.metrics import frechet, kernels, precision_recall, statistics
from imagegpt_jax.models.pretrained.inception import Inception

ROOT = pathlib.Path(__file__).resolve().parents[2]


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "golden" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def golden():
    with np.load(ROOT / "tests" / "golden" / "metrics.npz") as file:
        return dict(file)


def rows(name):
    kept = statistics.Rows(golden()[name].shape[1])
    kept.add(golden()[name])
    return kept


def gaussian(name):
    moments = statistics.Moments(golden()[name].shape[1])
    moments.add(golden()[name])
    return frechet.Gaussian.of(moments)


@pytest.mark.parametrize("prefix", ["", "wide_"])
def test_fid_kid_precision_and_recall(prefix):
    expected = {name: golden()[f"expected_{prefix}{name}"] for name in ("fid", "kid", "precision_recall")}
    names = (f"{prefix}images", f"{prefix}references")
    assert frechet.distance(*map(gaussian, names)) == pytest.approx(float(expected["fid"]), rel=1e-4)
    values = kernels.kid(*map(rows, names), kernels.Subsets(count=10, size=20))
    np.testing.assert_allclose([values.mean(), values.std()], expected["kid"], rtol=1e-4)
    np.testing.assert_allclose(
        precision_recall.precision_recall(*map(rows, names)), expected["precision_recall"], rtol=1e-6
    )


def test_inception_score():
    scores = statistics.ClassScores(5, 20)
    scores.add(golden()["logits"], statistics.splits_by_number(60, 5, 2020))
    moments = [scores.scores.mean(), scores.scores.std()]
    np.testing.assert_allclose(moments, golden()["expected_is"], rtol=1e-6)


def test_inception_features():
    model = nnx.eval_shape(lambda: Inception(key=jax.random.key(0)))
    model.set_arrays(tool("reference_programs").random_inception(7), "the golden weights")
    features = jax.jit(lambda m, x: m(x))(model, golden()["pixels"])
    for name, every in {"pool": 16, "logits": 8, "spatial": 16}.items():
        value = golden()[f"expected_{name}"]
        np.testing.assert_allclose(
            np.asarray(getattr(features, name))[:, ::every],
            value,
            rtol=1e-4,
            atol=1e-4 * np.abs(value).max(),
            err_msg=name,
        )
