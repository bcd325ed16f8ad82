"""Reads `.pt`, `.pth`, `.ckpt` and `.bin` files of PyTorch without PyTorch: a zip of one pickle and raw storages.

The pickle is unpickled with a list of what it may name; nothing in it is ever called that is not on the list, and what
training frameworks leave in checkpoints besides tensors becomes inert `Left` objects. Storages are read when asked for.
Of TorchScript programs only the tensors are read, under the names of the modules that hold them.
"""

import dataclasses
import io
import math
import pathlib
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from imagegpt_jax.convert.core import Tensor
from imagegpt_jax.errors import UserError

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Of a zip's local file header: its fixed part, and where the lengths of name and extra field stand.
_HEADER, _LENGTHS = 30, 26
# Packages whose objects in checkpoints hold settings, callbacks and the like.
_INERT = ("argparse", "pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "typing", "pathlib")


class Left:
    """Stands for an object that is not a tensor: keeps its state, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:  # a subclass of dict is unpickled item by item
        self.__dict__[str(key)] = value

    def append(self, value: Any) -> None:
        """Unpickling a subclass of list calls this."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    file: pathlib.Path
    offset: int
    dtype: np.dtype
    size: int

    def tensor(self, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        def read() -> np.ndarray:
            last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if 0 not in shape else -1
            offset = self.offset + start * self.dtype.itemsize
            flat = np.fromfile(self.file, self.dtype, last + 1, offset=offset)
            if contiguous(shape) == strides or flat.size <= 1:
                return flat.reshape(shape)
            steps = [step * self.dtype.itemsize for step in strides]
            return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, shape, steps))

        return Tensor(tuple(shape), self.dtype, read)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array in row-major order."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _rebuild(storage: _Storage, start: int, shape: Any, strides: Any, *rest: Any) -> Tensor:
    return storage.tensor(start, tuple(shape), tuple(strides))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): Left,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): Left,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("_codecs", "encode"): lambda text, encoding="latin1": str(text).encode("latin1"),
    ("numpy", "dtype"): Left,
    ("numpy.core.multiarray", "scalar"): Left,
    ("numpy._core.multiarray", "scalar"): Left,
}


class _Unpickler(pickle.Unpickler):
    _script = False  # whether the file is a TorchScript program

    def __init__(self, data: bytes, path: pathlib.Path, offsets: dict[str, int], script: bool):
        super().__init__(io.BytesIO(data))
        self._path, self._offsets, self._script = path, offsets, script

    def find_class(self, module: str, name: str) -> Any:
        if self._script and (module.startswith("__torch__") or module == "torch.jit._pickle"):
            return Left
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return name
        if module == "torch" and name.islower():  # a dtype, such as torch.float32
            return Left
        if module.split(".")[0] in _INERT:
            return Left
        raise UserError(
            f"{self._path} names {module}.{name}, which a checkpoint of weights has no need of: it was not read. Save"
            " the tensors alone, as a dict, or as safetensors."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, size = pid
        if kind != "storage" or storage not in _STORAGES:
            raise UserError(f"{self._path} holds a storage of the unknown kind {storage!r}.")
        return _Storage(self._path, self._offsets[key], np.dtype(_STORAGES[storage]), size)


def read(path: pathlib.Path) -> Any:
    """The pickled object of a file, with a lazy `Tensor` for every tensor.

    Raises:
      UserError: if the file is not of this format, or names something that is not on the list.
    """
    if not zipfile.is_zipfile(path):
        from imagegpt_jax.weight_files import torch_legacy  # which is made of this module

        return torch_legacy.read(path)
    with zipfile.ZipFile(path) as archive:
        entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
        if "data.pkl" not in entries:
            raise UserError(f"{path} is a zip without data.pkl: it was not written by torch.save.")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != sys.byteorder.encode():
            raise UserError(f"{path} was written on a machine of the other byte order: save it as safetensors there.")
        data = archive.read(entries["data.pkl"])
    offsets = {}
    with open(path, "rb") as file:
        for name, entry in entries.items():
            if name.startswith("data/"):
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise UserError(f"{path} is compressed: load it with torch and save it again.")
                file.seek(entry.header_offset + _LENGTHS)
                lengths = np.frombuffer(file.read(4), "<u2")
                offsets[name.removeprefix("data/")] = entry.header_offset + _HEADER + int(lengths.sum())
    try:
        script = "constants.pkl" in entries  # which TorchScript has besides
        tree = _Unpickler(data, path, offsets, script).load()
        return _attributes(tree) if script else tree
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, IndexError, TypeError, ValueError) as e:
        raise UserError(f"{path} is damaged ({e}): copy it again.") from e


def _attributes(tree: Any) -> Any:
    """The modules of a TorchScript program as nested dicts."""
    return {name: _attributes(value) for name, value in vars(tree).items()} if isinstance(tree, Left) else tree


def tensors(tree: Any) -> dict[str, Tensor]:
    """All tensors of nested dicts, by their dotted names."""
    found: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, f"{name}.{key}" if name else str(key))

    walk(tree, "")
    return found
