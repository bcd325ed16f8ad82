"""Safetensors files: as the library reads and writes them, and every header that breaks a rule is refused with it."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from imagegpt_jax.errors import UserError
from imagegpt_jax.weight_files import safetensors_file

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
}


def write(path, arrays=ARRAYS):
    sizes = {name: (a.shape, a.dtype) for name, a in arrays.items()}
    safetensors_file.write(path, sizes, reversed(list(arrays.items())), {"format": "pt"})


def test_files_are_those_of_the_library(tmp_path):
    write(tmp_path / "ours.safetensors")
    theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    safetensors.numpy.save_file(ARRAYS, tmp_path / "theirs.safetensors")
    ours, metadata = safetensors_file.read(tmp_path / "theirs.safetensors")
    assert metadata == {}
    assert safetensors_file.read(tmp_path / "ours.safetensors")[1] == {"format": "pt"}
    for name, array in ARRAYS.items():
        for got in (theirs[name], ours[name].read()):
            assert got.dtype == array.dtype
            np.testing.assert_array_equal(got, array)


def file_of(header, size=16):
    """A file with this header, as text, bytes or JSON, and so many bytes of data."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded + bytes(i * 37 % 251 for i in range(size))


def tensor(kind="F32", shape=(4,), begin=0, end=16, **more):
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end], **more}


def byte(begin, end):
    return tensor("U8", (end - begin,), begin, end)


def fill(header):
    """A header with a tensor for ONE, or with what is inside of its braces for FIELDS."""
    one = json.dumps(tensor())
    return header.replace("ONE", one).replace("FIELDS", one[1:-1])


HUGE = 1 << 63

# Headers (and bytes of data) that both read.
ACCEPTED = {
    "one tensor": ({"a": tensor()}, 16),
    "no tensor": ({}, 0),
    "scalar": ({"a": tensor(shape=(), end=4)}, 4),
    "any order": ({"b": byte(4, 8), "a": byte(0, 4)}, 8),
    "empty tensors at the same place": ({"a": byte(0, 0), "b": byte(0, 4), "c": tensor("F64", (0, 3), 4, 4)}, 4),
    "space around": (fill(' \n{"a": ONE}   '), 16),
    "metadata": ({"__metadata__": {"x": "y"}, "a": tensor()}, 16),
    "null metadata": ({"__metadata__": None, "a": tensor()}, 16),
    "other fields": ({"a": tensor(more=[1, -2.5, {"x": None}])}, 16),
    "empty name": ({"": tensor()}, 16),
    "a pair of surrogates": (fill('{"\\ud83d\\ude00": ONE}'), 16),
    **{kind: ({"a": tensor(kind, (16 // size,))}, 16) for kind, size in (
        ("BOOL", 1), ("U8", 1), ("I8", 1), ("F8_E5M2", 1), ("F8_E4M3", 1), ("F8_E8M0", 1), ("F8_E4M3FNUZ", 1),
        ("F8_E5M2FNUZ", 1), ("I16", 2), ("U16", 2), ("F16", 2), ("BF16", 2), ("I32", 4), ("U32", 4), ("F32", 4),
        ("C64", 8), ("F64", 8), ("I64", 8), ("U64", 8),
    )},
}  # fmt: skip

# Headers (and bytes of data) that both refuse.
REFUSED = {
    "shape needs less": ({"a": tensor(shape=(3,))}, 16),
    "shape needs more": ({"a": tensor(shape=(5,))}, 16),
    "negative size": ({"a": tensor(shape=(-4,))}, 16),
    "two negative sizes": ({"a": tensor(shape=(-2, -2))}, 16),
    "minus zero": ('{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}', 0),
    "fraction": ({"a": tensor(shape=(4.0,))}, 16),
    "truth as a size": ({"a": tensor("U8", (16, True))}, 16),
    "shape is null": ({"a": {**tensor(), "shape": None}}, 16),
    "shape is a number": ({"a": {**tensor(), "shape": 4}}, 16),
    "shape is text": ({"a": {**tensor(), "shape": "4"}}, 16),
    "negative offset": ({"a": tensor(begin=-16, end=0)}, 16),
    "offsets backwards": ({"a": tensor("U8", (0,), 4, 0)}, 4),
    "one offset": ({"a": {**tensor(), "data_offsets": [0]}}, 16),
    "three offsets": ({"a": {**tensor(), "data_offsets": [0, 16, 16]}}, 16),
    "gap at the start": ({"a": byte(1, 5)}, 5),
    "gap": ({"a": byte(0, 4), "b": byte(8, 12)}, 12),
    "overlap": ({"a": byte(0, 4), "b": byte(2, 6)}, 6),
    "same place": ({"a": byte(0, 4), "b": byte(0, 4)}, 4),
    "bytes after the last": ({"a": tensor()}, 20),
    "cut short": ({"a": tensor()}, 12),
    "end beyond everything": ({"a": tensor("U8", (4,), 0, 2 * HUGE - 1)}, 4),
    "size beyond 64 bits": ({"a": tensor("U8", (0, 2 * HUGE), 0, 0)}, 0),
    "product wraps to the right size": ({"a": tensor("F32", ((1 << 62) + 1,), 0, 4)}, 4),
    "product wraps to nothing": ({"a": tensor("U8", (HUGE, 4), 0, 0)}, 0),
    "product wraps before a zero": ({"a": tensor("U8", (HUGE, 4, 0), 0, 0)}, 0),
    "unknown dtype": ({"a": tensor("F31")}, 16),
    "dtype in small letters": ({"a": tensor("f32")}, 16),
    "dtype is a number": ({"a": tensor(1)}, 16),
    "dtype is a list": ({"a": tensor([])}, 16),
    "half a byte of F4": ({"a": tensor("F4", (3,), 0, 2)}, 2),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, 16),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, 16),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}}, 16),
    "tensor is null": ({"a": None}, 0),
    "tensor is text": ({"a": "F32"}, 0),
    "header is a list": ([], 0),
    "header is null": (None, 0),
    "header is a number": ("3", 0),
    "header is nothing": ("", 0),
    "header is space": ("   ", 0),
    "header is no JSON": ("notjson!", 0),
    "quotes of Python": (fill("{'a': ONE}"), 16),
    "comma too many": (fill('{"a": ONE,}'), 16),
    "NUL after it": (fill('{"a": ONE}\0'), 16),
    "tab in a name": (fill('{"a\tb": ONE}'), 16),
    "byte order mark": (b"\xef\xbb\xbf" + fill('{"a": ONE}').encode(), 16),
    "UTF-16": (fill('{"a": ONE}').encode("utf-16"), 16),
    "Latin-1": (fill('{"\xe9": ONE}').encode("latin-1"), 16),
    "half a surrogate": (fill('{"\\ud800": ONE}'), 16),
    "half a surrogate in metadata": (fill('{"__metadata__": {"a": "\\ud800"}, "a": ONE}'), 16),
    "not a number": (fill('{"a": {FIELDS, "more": NaN}}'), 16),
    "too large a number": (fill('{"a": {FIELDS, "more": 1e999}}'), 16),
    "very deep": (fill('{"a": {FIELDS, "more": DEEP}}').replace("DEEP", "[" * 100_000 + "]" * 100_000), 16),
    "a field twice": (fill('{"a": {"dtype": "F32", FIELDS}}'), 16),
    "metadata twice": (fill('{"__metadata__": {}, "__metadata__": {}, "a": ONE}'), 16),
    "metadata is a list": ({"__metadata__": [], "a": tensor()}, 16),
    "metadata holds a number": ({"__metadata__": {"x": 1}, "a": tensor()}, 16),
    "metadata holds null": ({"__metadata__": {"x": None}, "a": tensor()}, 16),
    "metadata holds an object": ({"__metadata__": {"x": {}}, "a": tensor()}, 16),
}  # fmt: skip

# What the library lets pass, and we do not: the format forbids duplicate names; a description is an object with a text;
# NumPy has neither packed numbers nor arrays with so many (and no) elements.
STRICTER = {
    "a name twice": (fill('{"a": ONE, "a": ONE}'), 16),
    "a name of metadata twice": (fill('{"__metadata__": {"x": "y", "x": "z"}, "a": ONE}'), 16),
    "tensor is a list": ({"a": ["F32", [4], [0, 16]]}, 16),
    "dtype is an object": ({"a": tensor({"F32": None})}, 16),
    "packed numbers": ({"a": tensor("F4", (32,))}, 16),
    "empty, of a size that no array has": ({"a": tensor("U8", (0, HUGE, 4), 0, 0)}, 0),
}  # fmt: skip


def refusal(path):
    with pytest.raises(UserError) as error:
        safetensors_file.read(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


@pytest.mark.parametrize("name", ACCEPTED)
def test_headers_that_the_library_reads(name, tmp_path):
    content = file_of(*ACCEPTED[name])
    (tmp_path / "x.safetensors").write_bytes(content)
    ours = safetensors_file.read(tmp_path / "x.safetensors")[0]
    theirs = dict(safetensors.deserialize(content))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        array = value.read()
        assert list(array.shape) == list(value.shape) == theirs[key]["shape"]
        assert array.tobytes() == bytes(theirs[key]["data"])


@pytest.mark.parametrize("name", REFUSED)
def test_headers_that_the_library_refuses(name, tmp_path):
    header, size = REFUSED[name]
    content = file_of(header, size)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)
    (tmp_path / "x.safetensors").write_bytes(content)
    message = refusal(tmp_path / "x.safetensors")
    if isinstance(header, dict) and header.get("a") and size != 20 and "__metadata__" not in header:
        assert "a" in message.split(": ")[1] or " a ends" in message or "b begins" in message


@pytest.mark.parametrize("name", STRICTER)
def test_headers_that_the_library_lets_pass(name, tmp_path):
    content = file_of(*STRICTER[name])
    safetensors.deserialize(content)
    (tmp_path / "x.safetensors").write_bytes(content)
    refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "cut short"), (b"\x08\0\0", "cut short"), (struct.pack("<Q", 1 << 63) + b"{}", "cut short")],
)
def test_files_that_are_none(content, words, tmp_path):
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)
    (tmp_path / "x.safetensors").write_bytes(content)
    assert words in refusal(tmp_path / "x.safetensors")


def test_a_header_beyond_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write(path)
    monkeypatch.setattr(safetensors_file, "MAX_HEADER", 64)
    assert "at most 64" in refusal(path)


def test_the_tensor_is_named(tmp_path):
    for entry, words in (
        (tensor(shape=(3,)), "deep.weight lies in bytes 0 to 16, and F32 of shape [3] needs 12"),
        (tensor("F4", (32,)), "deep.weight is F4, which is not read here"),
        (tensor("BF_16"), "Did you mean 'BF16'?"),
        (tensor(end=12, shape=(3,)), "12: copy it again"),
        (tensor(shape=(8,), end=32), "deep.weight ends at byte 32 of 16"),
    ):
        (tmp_path / "x.safetensors").write_bytes(file_of({"deep.weight": entry}))
        assert words in refusal(tmp_path / "x.safetensors")
