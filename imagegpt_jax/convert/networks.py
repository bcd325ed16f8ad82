"""Between a network's parameters and a flat list of named arrays, one name for each array of each layer.

The decoder keeps its blocks stacked, files keep them apart: `blocks/mlp/up/weight` [layers, D, F] is
`blocks.0.mlp.up.weight` [D, F], `blocks.1.mlp.up.weight`, and so on.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from imagegpt_jax import train_state
from imagegpt_jax.models.gpt import GPT
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.models.palette import Palette, PaletteConfig
from imagegpt_jax.models.vq import VQConfig, VQModel
from imagegpt_jax.weight_files.tensor import Shape

Config = VQConfig | PaletteConfig | GPTConfig
_STACKED = "blocks"
# What XLA asks of memory on the host that it is to use as it lies.
_ALIGNMENT = 64


def network(config: Config) -> train_state.Network:
    """The network that a config describes; nothing is allocated."""
    if isinstance(config, GPTConfig):
        return train_state.network(lambda key: GPT(config, key=key))
    if isinstance(config, PaletteConfig):
        return train_state.network(lambda key: Palette(config, key=key))
    return train_state.network(lambda key: VQModel(config, key=key))


def _leaves(net: train_state.Network) -> dict[tuple[Any, ...], jax.ShapeDtypeStruct]:
    params = train_state.split(net.abstract)[1]
    return {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _arrays_of(path: tuple[Any, ...], shape: Shape) -> list[tuple[str, int | None]]:
    """The names of a parameter's arrays, each with its layer; None where the parameter is not stacked."""
    if path[0] != _STACKED:
        return [(".".join(map(str, path)), None)]
    return [(".".join(map(str, (_STACKED, layer, *path[1:]))), layer) for layer in range(shape[0])]


def shapes(net: train_state.Network) -> dict[str, Shape]:
    """Shape of every array by its name, all layers of one parameter after each other."""
    return {
        name: leaf.shape if layer is None else leaf.shape[1:]
        for path, leaf in _leaves(net).items()
        for name, layer in _arrays_of(path, leaf.shape)
    }


def assemble(
    net: train_state.Network,
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype_of: Callable[[str, np.dtype], np.dtype] = lambda name, dtype: dtype,
) -> train_state.Params:
    """Puts named arrays, every name of `shapes` once, into the network's parameters.

    These have the arrays' dtypes, or `dtype_of` (name, dtype in the file). Parameters are handed to JAX one by one as
    they become complete, so that with the arrays in the order of `shapes` the host holds little more than them.
    """
    leaves = _leaves(net)
    place = {name: (path, i) for path, leaf in leaves.items() for name, i in _arrays_of(path, leaf.shape)}
    open_: dict[tuple[Any, ...], tuple[np.ndarray, set[int]]] = {}
    params: train_state.Params = {}
    for name, array in arrays:
        path, layer = place[name]
        dtype = jax.dtypes.canonicalize_dtype(dtype_of(name, array.dtype))
        if path not in open_:
            open_[path] = (_empty(leaves[path].shape, dtype), set())
        stack, have = open_[path]
        if np.promote_types(stack.dtype, dtype) != stack.dtype:  # layers of different precision: all take the finest
            stack = stack.astype(np.promote_types(stack.dtype, dtype))
            open_[path] = (stack, have)
        stack[... if layer is None else layer] = array
        have.add(-1 if layer is None else layer)
        if layer is None or len(have) == len(stack):
            _put(params, path, jax.device_put(stack, jax.local_devices()[0], may_alias=True))
            del open_[path], stack
    assert not open_, f"incomplete: {sorted(map(str, open_))}"
    return params


def _empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Memory that JAX on the CPU can take over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _put(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def flat(params: Mapping[Any, Any]) -> Iterable[tuple[str, np.ndarray]]:
    """Named arrays of parameters, read from their devices one at a time."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for name, layer in _arrays_of(tuple(k.key for k in path), leaf.shape):
            yield name, np.asarray(leaf if layer is None else leaf[layer])
