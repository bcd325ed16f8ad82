"""Reads safetensors files an array at a time, as strictly as the `safetensors` library does, and writes them.

A file is the length of its header (8 bytes, little-endian), the header, and the arrays. The header is a JSON object
{name: {"dtype", "shape", "data_offsets": [begin, end]}}, and maybe "__metadata__": {str: str}; the arrays lie in the
rest of the file without gaps (github.com/huggingface/safetensors#format).
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.runtime import filesystem
from imagegpt_jax.weight_files.tensor import Shape, Tensor

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Numbers smaller than a byte, which lie packed; NumPy has no such arrays.
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")
_NAMES = {np.dtype(kind): name for name, kind in _DTYPES.items()}
_FIELDS = ("dtype", "shape", "data_offsets")
MAX_HEADER = 100_000_000  # bytes, the library's limit
_LENGTH = 8  # bytes of the header's length


def read(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Arrays, which are read when they are asked for, and metadata of a file.

    Raises:
      UserError: if the file is damaged or breaks a rule of the format, naming the tensor.
    """
    header, start, size = _header(path)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} is not a safetensors file: its __metadata__ is no map of strings. Copy it again.")
    tensors, ranges = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(entry, f"{path}: {name}")
        if end > size:
            raise UserError(f"{path} was cut short: {name} ends at byte {end} of {size} of its data. Copy it again.")
        tensors[name] = _lazy(path, start + begin, shape, dtype)
        ranges.append((begin, end, name))
    previous = 0
    for begin, end, name in sorted(ranges):
        if begin != previous:
            raise UserError(
                f"{path}: {name} begins at byte {begin} of the data instead of {previous}: tensors neither overlap nor"
                " leave gaps. Copy the file again."
            )
        previous = end
    if previous != size:
        raise UserError(f"{path} has {size} bytes of data, and its tensors need {previous}: copy it again.")
    return tensors, metadata


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """(the header, where the data begins, bytes of data)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or length > size - _LENGTH:
            raise UserError(f"{path} is not a safetensors file, or it was cut short: copy it again.")
        if length > MAX_HEADER:
            raise UserError(f"{path} has a header of {length} bytes: safetensors have at most {MAX_HEADER}.")
        encoded = file.read(length)
    try:
        header = json.loads(encoded.decode(), object_pairs_hook=_unique, parse_int=_whole_number)
        json.dumps(header, ensure_ascii=False, allow_nan=False).encode()  # Python's reader takes more than JSON has
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a safetensors file ({e}): copy it again.") from e
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: its header is no JSON object. Copy it again.")
    return header, _LENGTH + length, size - _LENGTH - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice")
    return items


def _whole_number(text: str) -> float:
    return -0.0 if text == "-0" else int(text)


def _entry(entry: Any, where: str) -> tuple[np.dtype, Shape, int, int]:
    """(dtype, shape, begin, end) of a tensor, checked against each other."""
    if not isinstance(entry, dict) or not all(field in entry for field in _FIELDS):
        raise UserError(f"{where} is described without {', '.join(_FIELDS)}: copy the file again.")
    kind, shape, offsets = (entry[field] for field in _FIELDS)
    if not isinstance(kind, str) or kind not in _DTYPES:
        if kind in _PACKED:
            raise UserError(f"{where} is {kind}, which is not read here: save it as BF16 or F32.")
        raise UserError(f"{where} has the unknown dtype {kind!r}.{suggest(str(kind), _DTYPES)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise UserError(
            f"{where} has shape={shape!r} and data_offsets={offsets!r}: both are lists of whole numbers of at least 0,"
            " and offsets are two. Copy the file again."
        )
    dtype = np.dtype(_DTYPES[kind])
    if math.prod(n for n in shape if n) * dtype.itemsize >= 1 << 63:  # NumPy's limit, also of empty arrays
        raise UserError(f"{where} has the shape {shape}, which no memory holds: copy the file again.")
    (begin, end), needed = offsets, math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise UserError(
            f"{where} lies in bytes {begin} to {end}, and {kind} of shape {shape} needs {needed}: copy the file again."
        )
    return dtype, tuple(shape), begin, end


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 64 for n in value)


def _lazy(path: pathlib.Path, offset: int, shape: Shape, dtype: np.dtype) -> Tensor:
    def read() -> np.ndarray:
        # Not memory-mapped: pages of the file would count as memory of this process until something needs the room.
        return np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)

    return Tensor(shape, dtype, read)


def write(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[Shape, np.dtype]],
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file whole or not at all, the arrays one at a time in any order; `metadata` goes into its header."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end, begins = 0, {}
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
        begins[name] = begin
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    written = set()
    with filesystem.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(encoded).to_bytes(_LENGTH, "little") + encoded)
        for name, array in arrays:
            file.seek(_LENGTH + len(encoded) + begins[name])
            np.ascontiguousarray(array, shapes[name][1]).tofile(file)
            written.add(name)
        file.truncate(_LENGTH + len(encoded) + end)
        assert written == set(shapes), sorted(written ^ set(shapes))
