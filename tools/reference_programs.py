"""torch-fidelity and clean-fid, imported beside a PyTorch without torchvision, and weights to compare networks at.

Both import torchvision, which does not import beside the CPU build of torch: the Makefile installs them without their
dependencies, and this module stands in for the few names that they touch on import. Nothing that is compared uses them.
"""

import importlib.machinery
import pathlib
import sys
import types
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


def fidelity() -> types.SimpleNamespace:
    """Imports both: `.torch_fidelity`, `.cleanfid`; ImportError says what to type."""
    before = {name: found for name, found in sys.modules.items() if name.partition(".")[0] == "torchvision"}
    stand_ins = _stand_in_for_torchvision()
    sys.modules.update(stand_ins)
    try:
        import cleanfid.fid
        import cleanfid.resize
        import torch_fidelity
        import torch_fidelity.feature_extractor_inceptionv3
        import torch_fidelity.metric_kid
        import torch_fidelity.metric_prc
    except ImportError as e:
        raise ImportError(f"{e}: `make parity` installs torch-fidelity and clean-fid") from e
    finally:
        # Other programs must not take the stand-in for the real one.
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(before)
    return types.SimpleNamespace(torch_fidelity=torch_fidelity, cleanfid=cleanfid)


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
