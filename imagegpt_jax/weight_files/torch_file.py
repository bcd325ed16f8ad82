"""Reads `.pt`, `.pth`, `.ckpt` and `.bin` files of PyTorch without PyTorch: a zip of one pickle and raw storages.

Of TorchScript programs only the tensors are read, under the names of the modules that hold them.
"""

import io
import pathlib
import pickle
import sys
import zipfile
from typing import Any

import numpy as np

from imagegpt_jax.errors import UserError
from imagegpt_jax.weight_files import torch_legacy
from imagegpt_jax.weight_files.tensor import Tensor, tree_leaves
from imagegpt_jax.weight_files.torch_pickle import Left, Unpickler

# Of a zip's local file header: its fixed part, and where the lengths of name and extra field stand.
_HEADER, _LENGTHS = 30, 26


def read(path: pathlib.Path) -> Any:
    """The pickled object of a file, with a lazy `Tensor` for every tensor; raises UserError if it cannot be read."""
    if not zipfile.is_zipfile(path):
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
        tree = Unpickler(io.BytesIO(data), path, offsets, script).load()
        return _attributes(tree) if script else tree
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, IndexError, TypeError, ValueError) as e:
        raise UserError(f"{path} is damaged ({e}): copy it again.") from e


def _attributes(tree: Any) -> Any:
    """The modules of a TorchScript program as nested dicts."""
    return {name: _attributes(value) for name, value in vars(tree).items()} if isinstance(tree, Left) else tree


def tensors(tree: Any) -> dict[str, Tensor]:
    """All tensors of nested dicts, by their dotted names."""
    return {name: value for name, value in tree_leaves(tree) if isinstance(value, Tensor)}
