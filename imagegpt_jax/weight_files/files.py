"""Files of weights: opened without being read, and written an array at a time.

safetensors (one file, or shards with an index), PyTorch's zip format, and Flax's msgpack. A folder is one of these with
its `config.json`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from imagegpt_jax.errors import UserError
from imagegpt_jax.weight_files import safetensors_file, torch_file
from imagegpt_jax.weight_files.tensor import Shape, Tensor, tree_leaves

Sizes = Mapping[str, tuple[Shape, np.dtype]]
Arrays = Iterable[tuple[str, np.ndarray]]
_TORCH = (".pt", ".pth", ".ckpt", ".bin")
# What a folder's weights may be called, first what is preferred.
_IN_FOLDERS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
# What `transformers` calls the settings of an image processor.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that somebody published.

    Attributes:
      path: file or folder.
      config: the `config.json` beside the weights; {} without one.
      tensors: all arrays by name.
      extras: what a PyTorch checkpoint holds besides tensors, such as `args`.
    """

    path: pathlib.Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    extras: Mapping[str, Any]

    @property
    def folder(self) -> pathlib.Path:
        """Where the files lie."""
        return self.path if self.path.is_dir() else self.path.parent


def holds_weights(path: pathlib.Path) -> bool:
    """Whether a path is a file of weights, or a folder with some that is not one of our workdirs."""
    if path.is_file():
        return True
    if not path.is_dir() or (path / "checkpoints").exists():
        return False
    names = {p.name for p in path.iterdir()}
    endings = (".safetensors", ".safetensors.index.json", ".msgpack", *_TORCH)
    return bool(names & set(PROCESSORS)) or any(name.endswith(endings) for name in names)


def open_source(path: pathlib.Path) -> Source:
    """Opens a file or a folder of weights; raises UserError if there is none, or it is damaged."""
    if not path.exists():
        raise UserError(f"there is no file or folder {path}: give a file of weights, or a folder with one.")
    about = (path if path.is_dir() else path.parent) / "config.json"
    config = _read_json(about) if about.exists() else {}
    if path.is_file():
        return Source(path, config, *_open_file(path))
    weights = [path / name for name in _IN_FOLDERS if (path / name).exists()][:1]
    indices = sorted(path.glob("*.index*.json"), key=lambda p: (".safetensors." not in p.name, len(p.name)))
    if indices and not weights:
        return Source(path, config, _open_shards(indices[0]), {})
    if not weights and any((path / name).exists() for name in PROCESSORS):
        return Source(path, config, {}, {})  # the colours of an ImageGPT are all its tokenizer has
    weights = weights or sorted(p for p in path.iterdir() if p.suffix in (*_TORCH, ".safetensors", ".msgpack"))
    if len(weights) != 1:
        raise UserError(f"{path} holds {len(weights) or 'no'} files of weights: give the one to read.")
    return Source(path, config, *_open_file(weights[0]))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}): copy it again.") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: copy it again.")
    return value


def _suffix(path: pathlib.Path) -> str:
    """What a file's name should end in, by its first bytes if it does not; raises UserError if nothing tells."""
    known = (".safetensors", ".msgpack", *_TORCH)
    if path.suffix in known:
        return path.suffix
    with open(path, "rb") as file:
        begin = file.read(9)
    if begin[:2] == b"PK":
        return ".pt"
    if begin[8:] == b"{":
        return ".safetensors"
    if begin and (0x81 <= begin[0] <= 0x8F or begin[0] in (0xDE, 0xDF)):  # a map of msgpack
        return ".msgpack"
    raise UserError(f"{path} is not a known kind of file: weights end in {', '.join(known)}.")


def _open_file(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    suffix = _suffix(path)
    if suffix == ".safetensors":
        return safetensors_file.read(path)[0], {}
    if suffix == ".msgpack":
        return _open_msgpack(path), {}
    tree = torch_file.read(path)
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} holds no dict of tensors.")
    extras = {key: value for key, value in tree.items() if not isinstance(value, Mapping | Tensor)}
    # Checkpoints of training hold the optimizer's moments too: these are the names of the weights' part.
    for key in ("ema", "model", "state_dict", "module"):
        if isinstance(tree.get(key), Mapping) and torch_file.tensors(tree[key]):
            tree = tree[key]
            break
    return torch_file.tensors(tree), extras


def _open_shards(index: pathlib.Path) -> dict[str, Tensor]:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{index} has no weight_map from names to files: copy it again.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        path = index.parent / shard
        if not path.exists():
            raise UserError(f"{index} names {shard}, which is not there: copy it too.")
        held = _open_file(path)[0]
        tensors |= {name: tensor for name, tensor in held.items() if shards.get(name) == shard}
    missing = sorted(set(shards) - set(tensors))
    if missing:
        raise UserError(f"{index} names {missing[0]}, which its shard does not hold: copy the folder again.")
    return tensors


def _open_msgpack(path: pathlib.Path) -> dict[str, Tensor]:
    from flax import serialization  # imports JAX, for which nothing else here has a use

    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except Exception as e:  # the library raises what it happens to meet
        raise UserError(f"{path} is not Flax's msgpack ({e}): copy it again.") from e
    leaves = tree_leaves(tree.get("params", tree) if isinstance(tree, Mapping) else tree)
    arrays = ((name, np.asarray(value)) for name, value in leaves)
    return {name: Tensor(array.shape, array.dtype, lambda array=array: array) for name, array in arrays}


# What writes a published layout: (folder, shapes and dtypes, arrays, `config.json`).
Writer = Callable[[pathlib.Path, Sizes, Arrays, Mapping[str, Any]], None]


def write_folder(target: pathlib.Path, sizes: Sizes, arrays: Arrays, about: Mapping[str, Any]) -> None:
    """Writes `model.safetensors` as PyTorch's libraries expect it, and `config.json` if there is something to say."""
    safetensors_file.write(target / "model.safetensors", sizes, arrays, {"format": "pt"})
    if about:
        (target / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def write_msgpack(
    target: pathlib.Path, sizes: Sizes, arrays: Arrays, about: Mapping[str, Any], under: str = ""
) -> None:
    """Writes `flax_model.msgpack`, under a key of its own if there is one, and `config.json` if that says something."""
    from flax import serialization

    tree: dict[str, Any] = {}
    for name, array in arrays:
        *path, last = name.split(".")
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place[last] = np.ascontiguousarray(array)
    (target / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize({under: tree} if under else tree))
    if about:
        (target / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def write_clusters(target: pathlib.Path, sizes: Sizes, arrays: Arrays, about: Mapping[str, Any]) -> None:
    """Writes the `preprocessor_config.json` of an ImageGPT."""
    ((_, colours),) = arrays
    (target / PROCESSORS[0]).write_text(json.dumps({**about, "clusters": colours.tolist()}, indent=2) + "\n")
