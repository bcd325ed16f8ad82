"""LPIPS against the same definition in PyTorch, with the modules that PyPI's `lpips` 0.1.4 is made of.

`lpips` itself needs torchvision, so its networks are written out here from torch.nn layers.
"""

import jax
import numpy as np
import pytest
import torch
from torch import nn

from imagegpt_jax.models.pretrained.lpips import LPIPS

pytestmark = pytest.mark.parity


def alexnet():
    return [
        [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()],
        [nn.MaxPool2d(3, stride=2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()],
        [nn.MaxPool2d(3, stride=2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()],
    ]


def vgg16():
    slices, width = [], 3
    for i, (new, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        layers = [nn.MaxPool2d(2, stride=2)] if i else []
        for _ in range(count):
            layers += [nn.Conv2d(width, new, 3, padding=1), nn.ReLU()]
            width = new
        slices.append(layers)
    return slices


class Reference(nn.Module):
    """Scaling layer, slices of a classifier, unit vectors, 1x1 convolutions without bias, spatial average, sum."""

    def __init__(self, slices):
        super().__init__()
        self.slices = nn.ModuleList(nn.Sequential(*layers) for layers in slices)
        widths = [[m for m in s if isinstance(m, nn.Conv2d)][-1].out_channels for s in self.slices]
        self.heads = nn.ModuleList(nn.Conv2d(w, 1, 1, bias=False) for w in widths)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, a, b):
        a, b, total = (a - self.shift) / self.scale, (b - self.shift) / self.scale, 0
        for part, head in zip(self.slices, self.heads, strict=True):
            a, b = part(a), part(b)
            unit_a, unit_b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
            total = total + head((unit_a - unit_b).square()).mean((2, 3))
        return total[:, 0]


@pytest.mark.parametrize(("network", "slices", "size"), [("alexnet", alexnet, 64), ("vgg16", vgg16, 32)])
def test_distance_and_gradient(network, slices, size):
    torch.manual_seed(0)
    reference = Reference(slices())
    with torch.no_grad():
        for head in reference.heads:
            head.weight.abs_()
    convs = [m for m in reference.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    arrays = {f"heads.{i}": head.weight.detach().reshape(-1).numpy() for i, head in enumerate(reference.heads)}
    for i, conv in enumerate(convs):
        arrays[f"convs.{i}.kernel"] = conv.weight.detach().permute(2, 3, 1, 0).numpy()
        arrays[f"convs.{i}.bias"] = conv.bias.detach().numpy()
    ours = jax.eval_shape(lambda k: LPIPS(network, key=k), jax.random.key(0))
    ours.set_arrays(arrays, "the reference")

    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 2, size, size, 3)).astype(np.float32)
    image = torch.from_numpy(a).permute(0, 3, 1, 2).requires_grad_()
    expected = reference(image, torch.from_numpy(b).permute(0, 3, 1, 2))
    (gradient,) = torch.autograd.grad(expected.sum(), image)
    gradient = gradient.permute(0, 2, 3, 1).numpy()

    np.testing.assert_allclose(ours(a, b), expected.detach().numpy(), rtol=1e-5)
    ours_gradient = jax.grad(lambda a: ours(a, b).sum())(a)
    np.testing.assert_allclose(ours_gradient, gradient, rtol=0, atol=1e-4 * np.abs(gradient).max())


@pytest.mark.parametrize(("network", "slices", "head"), [("alexnet", alexnet, "alex.pth"), ("vgg16", vgg16, "vgg.pth")])
def test_files_of_torchvision_and_lpips(tmp_path, network, slices, head):
    """A classifier with its head, which LPIPS has no use for, and linear layers under the names of `lpips`."""
    torch.manual_seed(0)
    reference = Reference(slices())
    layers = [layer for part in slices() for layer in part]
    classifier = {"classifier.0.weight": torch.zeros(3, 3)}
    trained = iter(module for module in reference.slices.modules() if isinstance(module, nn.Conv2d))
    for place, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            conv = next(trained)
            classifier |= {f"features.{place}.weight": conv.weight.data, f"features.{place}.bias": conv.bias.data}
    linear = {f"lin{i}.model.1.weight": one.weight.data.abs_() for i, one in enumerate(reference.heads)}
    torch.save(classifier, tmp_path / f"{network}-12345678.pth", _use_new_zipfile_serialization=False)
    torch.save(linear, tmp_path / head)
    ours = LPIPS.load(tmp_path)
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 1, 48, 48, 3)).astype(np.float32)
    expected = reference(*(torch.from_numpy(x).permute(0, 3, 1, 2) for x in (a, b)))
    np.testing.assert_allclose(ours(a, b), expected.detach().numpy(), rtol=1e-4)
