"""rFID and KID of reconstructions within training: the same numbers as from files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax import sharding
from imagegpt_jax.evals import frechet, kernels, protocols, reconstruction, statistics
from imagegpt_jax.evals.features import Network


def network(name):
    """Features that are means of the four quarters, of three channels."""

    def apply(params, images):
        B, H, W, C = images.shape
        quarters = images.reshape(B, 2, H // 2, 2, W // 2, C).mean(axis=(2, 4)).reshape(B, -1)
        return {"pool": jnp.square(quarters / 255) * params}

    return Network(name, {}, np.asarray, apply, np.float32(2.0))


def reconstruct(params, images_BHWC):
    """Reconstructions are half as contrasted; all codes are zero."""
    return images_BHWC * params, jnp.zeros((len(images_BHWC), 2, 2), jnp.int32)


@pytest.mark.parametrize(("name", "devices"), [("inception", 1), ("inception", 8), ("other", 2)])
def test_scores_on_a_mesh(name, devices):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3))
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])
    batches = []
    for start in range(0, 30, 16):
        part = images[start : start + 16] / 127.5 - 1
        mask = np.arange(16) < len(part)
        part = np.concatenate([part, np.full((16 - len(part), 8, 8, 3), 0.9)])
        batches.append({"image": part.astype(np.float32), "mask": mask})
    with jax.set_mesh(mesh):
        compare = reconstruction.Comparison(network(name), mesh)
        scores, _ = reconstruction.evaluate(reconstruct, np.float32(0.5), batches, 4, mesh, compare=compare)
    assert ("rfid" in scores) == (name == "inception")
    fake = np.round((images / 127.5 - 1) * 0.5 * 127.5 + 127.5)
    rows, gaussians = [], []
    for pictures in (images, fake):
        features = np.asarray(network(name).apply(2.0, jnp.asarray(pictures, jnp.float32))["pool"])
        rows.append(statistics.Rows(12))
        rows[-1].add(features)
        moments = statistics.Moments(12)
        moments.add(features)
        gaussians.append(frechet.Gaussian.of(moments))
    assert scores["kid"] == pytest.approx(kernels.kid(rows[1], rows[0], protocols.find("emoji").kid).mean(), rel=1e-5)
    if name == "inception":
        assert scores["rfid"] == pytest.approx(frechet.distance(*gaussians), rel=1e-5)
    assert scores["images"] == 30
