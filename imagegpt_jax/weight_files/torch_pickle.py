"""Unpickles what PyTorch writes, without PyTorch: tensors become lazy `Tensor`s, and nothing unknown is ever called.

A pickle may name what is on a list; what training frameworks leave in checkpoints besides tensors becomes inert `Left`
objects. Storages are read when asked for.
"""

import dataclasses
import math
import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np

from imagegpt_jax.errors import UserError
from imagegpt_jax.weight_files.tensor import Tensor

STORAGES = {
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


class Unpickler(pickle.Unpickler):
    """Unpickles what a list allows.

    Attributes:
      path: of the file, for errors.
      offsets: where each storage lies in it, by key.
      script: whether it is a TorchScript program.
    """

    def __init__(self, stream: IO[bytes], path: pathlib.Path, offsets: dict[str, int], script: bool = False):
        super().__init__(stream)
        self.path, self.offsets, self.script = path, offsets, script

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for; raises UserError if it is not on the list."""
        if self.script and (module.startswith("__torch__") or module == "torch.jit._pickle"):
            return Left
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return name
        if module == "torch" and name.islower():  # a dtype, such as torch.float32
            return Left
        if module.split(".")[0] in _INERT:
            return Left
        raise UserError(
            f"{self.path} names {module}.{name}, which a checkpoint of weights has no need of: it was not read. Save"
            " the tensors alone, as a dict, or as safetensors."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, by the tuple that describes it."""
        kind, storage, key, _, size = pid
        if kind != "storage" or storage not in STORAGES:
            raise UserError(f"{self.path} holds a storage of the unknown kind {storage!r}.")
        return _Storage(self.path, self.offsets[key], np.dtype(STORAGES[storage]), size)
