"""Reads PyTorch files from before version 1.6, which are no zip: pickles one after another, then the storages.

Many public weights, the FID Inception's among them, are still in this form. The same names as in newer
files may occur in their pickles, and no others.
"""

import pathlib
import pickle
from typing import IO, Any

import numpy as np

from imagegpt_jax.errors import UserError
from imagegpt_jax.weight_files.torch_pickle import STORAGES, Unpickler

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_COUNT = 8  # bytes of the number of elements before each storage


class _Unpickler(Unpickler):
    """Storages have one more field here, for views of them; `sizes` holds kind and number of elements of each."""

    def __init__(self, stream: IO[bytes], path: pathlib.Path, offsets: dict[str, int]):
        super().__init__(stream, path, offsets)
        self.sizes: dict[str, tuple[str, int]] = {}

    def persistent_load(self, pid: Any) -> Any:
        if len(pid) != 6 or pid[5] is not None:
            raise UserError(f"{self.path} holds views of storages, as PyTorch wrote before 1.0: save it again.")
        self.offsets.setdefault(pid[2], 0)
        self.sizes[pid[2]] = (pid[1], pid[4])
        return super().persistent_load(pid[:5])


def read(path: pathlib.Path) -> Any:
    """The pickled object of a file, with a lazy `Tensor` for every tensor; raises UserError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            if _load(stream, path) != MAGIC or _load(stream, path) != _PROTOCOL:
                raise UserError(f"{path} was not written by torch.save: give a file of weights.")
            if not _load(stream, path).get("little_endian", True):
                raise UserError(
                    f"{path} was written on a machine of the other byte order: save it as safetensors there."
                )
            start = stream.tell()
            # Where storages lie is known after the tensors that use them: the tensors are read twice.
            offsets: dict[str, int] = {}
            first = _Unpickler(stream, path, offsets)
            first.load()
            keys = _load(stream, path)
            position, total = stream.tell(), path.stat().st_size
            for key in keys:
                kind, size = first.sizes[key]
                offsets[key] = position + _COUNT
                position += _COUNT + size * np.dtype(STORAGES[kind]).itemsize
            if position > total:
                raise UserError(f"{path} was cut short: it has {total} of {position} bytes. Copy it again.")
            stream.seek(start)
            return _Unpickler(stream, path, offsets).load()
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, IndexError, TypeError, ValueError) as e:
        raise UserError(f"{path} is not a file of PyTorch's, or it is damaged ({e}): copy it again.") from e


def _load(stream: Any, path: pathlib.Path) -> Any:
    return _Unpickler(stream, path, {}).load()
