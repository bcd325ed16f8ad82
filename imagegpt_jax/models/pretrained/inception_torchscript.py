"""The FID Inception's weights as NVIDIA publishes them, `inception-2015-12-05.pt`: which clean-fid and StyleGAN3 read.

The file is a TorchScript program with the graph's own names; only its tensors are read. Each convolution has a kernel,
and the mean, variance and shift of its batch norm, which has no scale.
"""

from collections.abc import Mapping

import numpy as np

_BLOCKS = [f"Mixed_{number}" for number in ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]]
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_MIXED = ("tower_mixed_conv", "tower_mixed_conv_1", "tower_1_mixed_conv", "tower_1_mixed_conv_1")


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def _chain(tower: str, branch: str, count: int) -> dict[str, str]:
    """The convolutions of a tower, one after another."""
    return {f"{tower}_{_numbered('conv', i)}": f"{branch}_{i + 1}" for i in range(count)}


def _names() -> dict[str, str]:
    """Their convolution, with "_" for every dot -> ours."""
    kinds: list[dict[str, str]] = [
        {"conv": "branch1x1", "tower_2_conv": "branch_pool"}
        | _chain("tower", "branch5x5", 2)
        | _chain("tower_1", "branch3x3dbl", 3),
        {"conv": "branch3x3"} | _chain("tower", "branch3x3dbl", 3),
        {"conv": "branch1x1", "tower_2_conv": "branch_pool"}
        | _chain("tower", "branch7x7", 3)
        | _chain("tower_1", "branch7x7dbl", 5),
        _chain("tower", "branch3x3", 2) | _chain("tower_1", "branch7x7x3", 4),
        {"conv": "branch1x1", "tower_2_conv": "branch_pool"}
        | _chain("tower", "branch3x3", 1)
        | _chain("tower_1", "branch3x3dbl", 2)
        | dict(zip(_MIXED, ("branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b"), strict=True)),
    ]
    names = {_numbered("conv", i): name for i, name in enumerate(_STEM)}
    for i, (block, kind) in enumerate(zip(_BLOCKS, (0, 0, 0, 1, 2, 2, 2, 2, 3, 4, 4), strict=True)):
        names |= {f"{_numbered('mixed', i)}_{theirs}": f"{block}.{ours}" for theirs, ours in kinds[kind].items()}
    return names


def is_torchscript(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether names are those of NVIDIA's file."""
    return any(name.startswith("layers.") for name in arrays)


def renamed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of NVIDIA's file under the names of the PyTorch state dict; what is not known keeps its name."""
    names, state_dict = _names(), {}
    for name, array in arrays.items():
        layer, _, part = name.removeprefix("layers.").rpartition(".")
        ours = names.get(layer.replace(".", "_"))
        if name.startswith("output."):
            state_dict[name.replace("output.", "fc.")] = array
        elif ours is None:
            state_dict[name] = array
        elif array.ndim == 4:
            state_dict[f"{ours}.conv.weight"] = array
        else:
            norm = "running_mean" if "mean" in part else "running_var" if "var" in part else "bias"
            state_dict[f"{ours}.bn.{norm}"] = array
            state_dict.setdefault(f"{ours}.bn.weight", np.ones_like(array))
    return state_dict
