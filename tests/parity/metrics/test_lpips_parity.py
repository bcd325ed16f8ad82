"""LPIPS against PyPI's `lpips`: random classifiers, and the heads that it brings."""

import pathlib

import jax
import numpy as np
import pytest
import torch

from imagegpt_jax.models.pretrained.lpips import LPIPS

pytestmark = pytest.mark.parity

# Our name of the network, theirs, and the side of the test's images.
NETWORKS = [("alexnet", "alex", 64), ("vgg16", "vgg", 32)]


@pytest.fixture(scope="module")
def package(programs):
    return programs.lpips()


def reference(package, name):
    """The network of the package, its convolutions as random as a classifier's."""
    torch.manual_seed(0)
    module = package.LPIPS(net=name, pnet_rand=True, verbose=False)
    for parameter in module.net.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def saved(package, module, network, name, folder):
    """torchvision's file of the classifier, with a head that LPIPS has no use for, and the package's file of heads."""
    state = {"classifier.0.weight": torch.zeros(3, 3)}
    for part in module.net.children():
        for number, layer in part.named_children():  # under their numbers among the classifier's features
            state |= {f"features.{number}.{key}": value for key, value in layer.state_dict().items()}
    torch.save(state, folder / f"{network}-12345678.pth")
    heads = pathlib.Path(package.__file__).parent / "weights" / "v0.1" / f"{name}.pth"
    (folder / f"{name}.pth").write_bytes(heads.read_bytes())


@pytest.mark.parametrize(("network", "name", "side"), NETWORKS)
def test_distance_and_gradient(package, tmp_path, network, name, side):
    module = reference(package, name)
    saved(package, module, network, name, tmp_path)
    ours = LPIPS.load(tmp_path)
    assert ours.network == network
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 2, side, side, 3)).astype(np.float32)
    image = torch.from_numpy(a).permute(0, 3, 1, 2).requires_grad_()
    expected = module(image, torch.from_numpy(b).permute(0, 3, 1, 2))[:, 0, 0, 0]
    (gradient,) = torch.autograd.grad(expected.sum(), image)
    gradient = gradient.permute(0, 2, 3, 1).numpy()
    assert expected.min() > 0.01
    np.testing.assert_allclose(ours(a, b), expected.detach().numpy(), rtol=1e-4)
    ours_gradient = jax.grad(lambda a: ours(a, b).sum())(a)
    np.testing.assert_allclose(ours_gradient, gradient, rtol=0, atol=1e-4 * np.abs(gradient).max())
