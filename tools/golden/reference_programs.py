"""torch-fidelity, clean-fid and lpips, imported beside a PyTorch without torchvision, and weights to compare at.

All import torchvision, which does not import beside the CPU build of torch: the Makefile installs them without their
dependencies, and this module stands in for the few names that they touch on import. Of what is compared only lpips uses
some: the layers of two classifiers, which are written out here.
"""

import contextlib
import importlib.machinery
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np


def _stand_in_for_torchvision() -> dict[str, types.ModuleType]:
    def module(name: str) -> Any:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        return made

    names = ("transforms", "transforms.functional", "datasets", "models", "models.inception")
    parts = {name: module(f"torchvision.{name}") for name in names}
    root = module("torchvision")
    root.__version__ = "0"
    for name, part in parts.items():
        parent, _, child = name.rpartition(".")
        setattr(parts[parent] if parent else root, child, part)
    classes = {
        "datasets": ("CIFAR10", "CIFAR100", "STL10"),
        "models.inception": ("InceptionA", "InceptionC", "InceptionE"),
        "transforms": ("ToTensor", "Compose", "Normalize", "Resize", "CenterCrop"),
    }
    for name, members in classes.items():
        for member in members:
            setattr(parts[name], member, type(member, (), {"__init__": lambda self, *args, **kwargs: None}))
    return {"torchvision": root, **{f"torchvision.{name}": part for name, part in parts.items()}}


@contextlib.contextmanager
def _torchvision() -> Iterator[dict[str, types.ModuleType]]:
    """The stand-in for as long as something is imported: other programs must not take it for the real one."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchvision"}
    stand_ins = _stand_in_for_torchvision()
    sys.modules.update(stand_ins)
    try:
        yield stand_ins
    except ImportError as e:
        raise ImportError(f"{e}: `make parity` installs torch-fidelity, clean-fid and lpips") from e
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(before)


def fidelity() -> types.SimpleNamespace:
    """Imports both: `.torch_fidelity`, `.cleanfid`; ImportError says what to type."""
    with _torchvision():
        import cleanfid.fid
        import cleanfid.resize
        import torch_fidelity
        import torch_fidelity.feature_extractor_inceptionv3
        import torch_fidelity.metric_kid
        import torch_fidelity.metric_prc
    return types.SimpleNamespace(torch_fidelity=torch_fidelity, cleanfid=cleanfid)


def lpips() -> types.ModuleType:
    """Imports lpips, whose networks have random weights and whose heads those that it brings."""
    with _torchvision() as stand_ins:
        models: Any = stand_ins["torchvision.models"]
        models.alexnet, models.vgg16, models.squeezenet1_1 = _alexnet, _vgg16, None
        import lpips

        return lpips


def _alexnet(pretrained: bool) -> types.SimpleNamespace:
    """torchvision's AlexNet as far as its features."""
    from torch import nn

    def pool() -> Any:
        return nn.MaxPool2d(3, stride=2)

    layers = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), pool()]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool()]
    for c_in, c_out in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
    assert not pretrained
    return types.SimpleNamespace(features=nn.Sequential(*layers, pool()))


def _vgg16(pretrained: bool) -> types.SimpleNamespace:
    """torchvision's VGG-16 as far as its features."""
    from torch import nn

    layers, width = [], 3
    for c_out, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(width, c_out, 3, padding=1), nn.ReLU()]
            width = c_out
        layers.append(nn.MaxPool2d(2, stride=2))
    assert not pretrained
    return types.SimpleNamespace(features=nn.Sequential(*layers))


def random_inception(seed: int) -> dict[str, np.ndarray]:
    """Random weights of the FID Inception under the names of its PyTorch file, the same wherever they are drawn."""
    import jax
    from flax import nnx

    from imagegpt_jax.models.pretrained.inception import NUM_CLASSES, NUM_FEATURES, Inception

    rng = np.random.default_rng(seed)
    state = {}
    for name, unit in sorted(nnx.eval_shape(lambda: Inception(key=jax.random.key(0))).units()):
        height, width, c_in, c_out = unit.kernel.shape
        deviation = np.float32((2 / (height * width * c_in)) ** 0.5)  # which keeps the size of what passes a ReLU
        state[f"{name}.conv.weight"] = rng.standard_normal((c_out, c_in, height, width), np.float32) * deviation
        state[f"{name}.bn.weight"] = rng.uniform(0.9, 1.1, c_out).astype(np.float32)
        state[f"{name}.bn.bias"] = rng.normal(0, 0.1, c_out).astype(np.float32)
        state[f"{name}.bn.running_mean"] = rng.normal(0, 0.1, c_out).astype(np.float32)
        state[f"{name}.bn.running_var"] = rng.uniform(0.8, 1.2, c_out).astype(np.float32)
    state["fc.weight"] = rng.standard_normal((NUM_CLASSES, NUM_FEATURES), np.float32) * np.float32(0.1)
    state["fc.bias"] = rng.standard_normal(NUM_CLASSES, np.float32)
    return state


def torch_inception(programs: types.SimpleNamespace, path: pathlib.Path) -> Any:
    """torch-fidelity's Inception with the weights of a file: images uint8 [B, 3, H, W] -> (pool, unbiased logits)."""
    extractor = programs.torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    return extractor("given", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))


def save_torch(arrays: dict[str, np.ndarray], path: pathlib.Path, *, legacy: bool = False) -> None:
    """Writes a state dict as torch.save does, or as it did before version 1.6."""
    import torch

    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
