"""The FID Inception against torch-fidelity's, at random weights from a file that torch.save wrote."""

import re

import jax
import numpy as np
import pytest
import torch

from imagegpt_jax.metrics import networks, resizing
from imagegpt_jax.models.pretrained import inception_torchscript
from imagegpt_jax.models.pretrained.inception import Inception

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
    results = jax.jit(ours.apply)(ours.params, pictures[[0, 40]])
    expected = {
        "pool": pool.numpy(),
        "logits": logits.numpy(),
        "spatial": spatial[0].permute(0, 2, 3, 1)[..., :7].reshape(2, -1).numpy(),
    }
    for name, value in expected.items():
        assert value.std() > 0.01, name
        np.testing.assert_allclose(results[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=name)


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


def script_of(arrays):
    """A TorchScript program with the weights under the names that NVIDIA's file has."""
    ours = {name: theirs for theirs, name in inception_torchscript._names().items()}
    root = torch.nn.Module()

    def put(path, value):
        *parents, last = path.split(".")
        place = root
        for name in parents:
            if not hasattr(place, name):
                setattr(place, name, torch.nn.Module())
            place = getattr(place, name)
        place.register_buffer(last, torch.from_numpy(value))

    for name, layer in ours.items():
        dotted = re.sub(r"^(mixed(?:_\d+)?|tower(?:_\d)?)_(?=tower|conv|mixed)", r"\1.", layer)
        dotted = re.sub(r"(?<=\.)(tower(?:_\d)?)_(?=conv|mixed)", r"\1.", dotted).replace("mixed_conv", "mixed.conv")
        put(f"layers.{dotted}.weight", arrays[f"{name}.conv.weight"])
        put(f"layers.{dotted}.beta", arrays[f"{name}.bn.bias"])
        put(f"layers.{dotted}.mean", arrays[f"{name}.bn.running_mean"])
        put(f"layers.{dotted}.var", arrays[f"{name}.bn.running_var"])
    put("output.weight", arrays["fc.weight"])
    put("output.bias", arrays["fc.bias"])
    return torch.jit.script(root)


def test_torchscript(programs, tmp_path):
    """The weights of a program are those of a state dict whose batch norms have no scale."""
    arrays = programs.random_inception(1)
    for name in arrays:
        if name.endswith(".bn.weight"):
            arrays[name] = np.ones_like(arrays[name])
    programs.save_torch(arrays, tmp_path / "state.pth")
    script_of(arrays).save(str(tmp_path / "script.pt"))
    one, other = (Inception.load(tmp_path / name) for name in ("state.pth", "script.pt"))
    names = {layer for layer, _ in one.units()}
    assert len(names) == 94
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
