"""The FID Inception against torch-fidelity's, at random weights from a file that torch.save wrote."""

import jax
import numpy as np
import pytest
import torch

from imagegpt_jax.evals import networks, resizing

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def both(inception):
    return networks.load("inception", str(inception.path), "tf1_bilinear"), inception.network


def test_features_and_logits(both, pictures):
    ours, theirs = both
    spatial = []
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: spatial.append(out))
    images = torch.from_numpy(pictures[[0, 40]]).permute(0, 3, 1, 2)
    with torch.no_grad():
        pool, logits = theirs(images)
    hook.remove()
    found = jax.jit(ours.apply)(ours.params, pictures[[0, 40]])
    expected = {
        "pool": pool.numpy(),
        "logits": logits.numpy(),
        "spatial": spatial[0].permute(0, 2, 3, 1)[..., :7].reshape(2, -1).numpy(),
    }
    for name, value in expected.items():
        assert value.std() > 0.01, name
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("shape", [(40, 52), (299, 299), (400, 310)])
def test_resizing_of_clean_fid(fidelity, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    expected = fidelity.cleanfid.resize.build_resizer("clean")(image)
    np.testing.assert_array_equal(resizing.pil_bicubic_float(image, 299), expected)


@pytest.mark.parametrize("shape", [(40, 52), (400, 310)])
def test_resizing_of_the_graph(fidelity, shape):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as reference

    from imagegpt_jax.models.pretrained.inception import resize

    image = np.random.default_rng(0).integers(0, 256, (1, *shape, 3)).astype(np.float32)
    expected = reference(torch.from_numpy(image).permute(0, 3, 1, 2), (299, 299), align_corners=False)
    np.testing.assert_allclose(resize(image), expected.permute(0, 2, 3, 1).numpy(), rtol=0, atol=2e-4)
