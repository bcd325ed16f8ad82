"""Files of weights: fetched once, checked by hash, and fitted to a network exactly."""

import hashlib

import numpy as np
import pytest
import safetensors.numpy

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.pretrained import clip, dinov2, efficientnet, inception, weights


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEGPT_JAX_CACHE", str(tmp_path / "cache"))
    data = b"some weights"
    (tmp_path / "source").write_bytes(data)
    return weights.File("w.pth", f"file://{tmp_path / 'source'}", hashlib.sha256(data).hexdigest())


def test_a_file_is_fetched_once(file, tmp_path):
    results = weights.fetch(file, "--x=FILE")
    assert results.read_bytes() == b"some weights"
    assert [path.name for path in results.parent.iterdir()] == ["w.pth"]
    (tmp_path / "source").unlink()
    assert weights.fetch(file, "--x=FILE") == results


def test_what_is_not_the_file_is_refused(file, tmp_path):
    (tmp_path / "source").write_bytes(b"a page that says please log in")
    with pytest.raises(UserError, match=r"source has the SHA-256 .* instead of"):
        weights.fetch(file, "--x=FILE")
    assert not (tmp_path / "cache" / "weights" / "w.pth").exists()
    (tmp_path / "source").write_bytes(b"some weights")
    weights.fetch(file, "--x=FILE").write_bytes(b"bits have turned")
    with pytest.raises(UserError, match=r"w.pth has the SHA-256 .*: it is damaged"):
        weights.fetch(file, "--x=FILE")


def test_no_network(file, tmp_path):
    (tmp_path / "source").unlink()
    with pytest.raises(UserError, match=r"could not be downloaded .* give it by --x=FILE"):
        weights.fetch(file, "--x=FILE")


def test_arrays_must_fit_exactly():
    expected = {"a": (2, 3), "b": (4,)}
    weights.check({"a": np.zeros((2, 3)), "b": np.zeros(4)}, expected, "f", "a network")
    with pytest.raises(
        UserError, match=r"f does not hold a network: b is missing; c is unknown; a is \(3, 2\), not \(2, 3\)"
    ):
        weights.check({"a": np.zeros((3, 2)), "c": np.zeros(4)}, expected, "f", "a network")


def test_batch_norm_is_folded_into_the_kernel():
    rng = np.random.default_rng(0)
    arrays = {
        "k": rng.normal(size=(4, 3, 1, 1)).astype(np.float32),
        "n.weight": rng.uniform(0.5, 2, 4).astype(np.float32),
        "n.bias": rng.normal(size=4).astype(np.float32),
        "n.running_mean": rng.normal(size=4).astype(np.float32),
        "n.running_var": rng.uniform(0.5, 2, 4).astype(np.float32),
    }
    kernel, bias = weights.fold_batch_norm(arrays, "k", "n", 1e-3)
    x = rng.normal(size=3)
    plain = arrays["k"][:, :, 0, 0] @ x
    expected = (plain - arrays["n.running_mean"]) / np.sqrt(arrays["n.running_var"] + 1e-3)
    expected = expected * arrays["n.weight"] + arrays["n.bias"]
    np.testing.assert_allclose(x @ kernel[0, 0] + bias, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (inception.Inception, "does not hold the FID Inception-v3: .* is missing"),
        (clip.CLIP, "not weights of CLIP"),
        (dinov2.DINOv2, "not weights of DINOv2"),
        (efficientnet.EfficientNetLite0, "does not hold EfficientNet-Lite0"),
    ],
)
def test_files_of_other_networks(tmp_path, network, words):
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=words):
        network.load(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="there are no weights at"):
        network.load(tmp_path / "y.safetensors")


def test_packaged_weights_are_of_the_network():
    """The package that KID is computed with offline."""
    model = efficientnet.EfficientNetLite0.load(efficientnet.packaged())
    kernel = np.asarray(model.stem.kernel[...])
    assert kernel.shape == (3, 3, 3, 32)
    assert np.isfinite(kernel).all()
    assert kernel.std() > 0.01


def test_resizing_of_positions_is_an_average():
    for size, target in ((5, 5), (5, 3), (4, 9)):
        matrix = dinov2.cubic(size, target)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(dinov2.cubic(5, 5), np.eye(5), atol=1e-6)
