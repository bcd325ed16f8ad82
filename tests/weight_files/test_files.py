"""Reading and writing files of weights, and every way that they can be wrong."""

import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from flax import serialization

import imagegpt_jax as ig
from imagegpt_jax.errors import UserError
from imagegpt_jax.weight_files import files, safetensors_file, torch_file

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
}


def write(path, arrays=ARRAYS):
    sizes = {name: (a.shape, a.dtype) for name, a in arrays.items()}
    safetensors_file.write(path, sizes, reversed(list(arrays.items())), {"format": "pt"})


def test_shards_need_all_their_files(tmp_path):
    write(tmp_path / "1.safetensors", {"a": ARRAYS["a"]})
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names 2\.safetensors, which is not there"):
        files.open_source(tmp_path)
    write(tmp_path / "2.safetensors", {"other": ARRAYS["a"]})
    with pytest.raises(UserError, match="names b, which its shard does not hold"):
        files.open_source(tmp_path)
    write(tmp_path / "2.safetensors", {"b": ARRAYS["b"]})
    assert set(files.open_source(tmp_path).tensors) == {"a", "b"}
    for text, words in (
        ("[]", "is not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=words):
            files.open_source(tmp_path)


def test_folders_without_weights_and_unknown_files(tmp_path):
    with pytest.raises(UserError, match="holds no files of weights"):
        files.open_source(tmp_path)
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="is not a known kind of file"):
        ig.load_tokenizer(tmp_path / "weights.onnx")
    with pytest.raises(UserError, match="there is no file or folder"):
        files.open_source(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------------ PyTorch's zip


class _Call:
    """Pickled as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def torch_zip(path, payload, entries=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        for name, content in entries:
            archive.writestr(f"archive/{name}", content)


def test_a_pickle_that_calls_something_is_refused(tmp_path):
    marker = tmp_path / "ran"
    torch_zip(tmp_path / "evil.pt", pickle.dumps({"model": _Call(os.system, f"touch {marker}")}, 2))
    with pytest.raises(UserError, match=r"names (posix|nt)\.system, which a checkpoint of weights has no need of"):
        torch_file.read(tmp_path / "evil.pt")
    assert not marker.exists()
    for function in (eval, exec, getattr):
        torch_zip(tmp_path / "evil.pt", pickle.dumps(_Call(function, "1"), 2))
        with pytest.raises(UserError, match="has no need of"):
            torch_file.read(tmp_path / "evil.pt")


def test_files_that_are_not_pytorchs_are_told(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(UserError, match=r"without data\.pkl"):
        torch_file.read(path)
    torch_zip(path, pickle.dumps({}, 2), [("byteorder", "middle")])
    with pytest.raises(UserError, match="other byte order"):
        torch_file.read(path)
    torch_zip(path, pickle.dumps({}, 2)[:-1])
    with pytest.raises(UserError, match="is damaged"):
        torch_file.read(path)


def test_tensors_of_any_strides_are_read(tmp_path):
    """Written as PyTorch does: a storage by its key, and views into it."""
    base = np.arange(24, dtype=np.float32)

    class Pickler(pickle._Pickler):  # the pure Python one, whose opcodes can be written by hand
        def save_global_name(self, module, name):
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    import io

    def view(start, shape, strides):
        stream = io.BytesIO()
        p = Pickler(stream, 2)
        p.write(b"\x80\x02")
        p.save_global_name("torch._utils", "_rebuild_tensor_v2")
        p.write(pickle.MARK + pickle.MARK)
        p.save("storage")
        p.save_global_name("torch", "FloatStorage")
        for value in ("0", "cpu", 24):
            p.save(value)
        p.write(pickle.TUPLE + pickle.BINPERSID)
        for value in (start, shape, strides, False):
            p.save(value)
        p.save_global_name("collections", "OrderedDict")
        p.write(pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE + pickle.STOP)
        return stream.getvalue()

    for start, shape, strides in (
        (0, (4, 6), (6, 1)),
        (6, (3,), (1,)),
        (1, (6, 3), (1, 6)),
        (5, (), ()),
        (0, (0, 2), (2, 1)),
    ):
        torch_zip(tmp_path / "x.pt", view(start, shape, strides), [("data/0", base.tobytes())])
        got = torch_file.read(tmp_path / "x.pt").read()
        steps = [4 * s for s in strides]
        np.testing.assert_array_equal(got, np.lib.stride_tricks.as_strided(base[start:], shape, steps))


def test_the_kind_of_a_file_is_told_by_its_first_bytes_where_its_name_does_not(tmp_path):
    write(tmp_path / "weights.safetensors")
    (tmp_path / "weights.safetensors").rename(tmp_path / "checkpoint")
    assert set(files.open_source(tmp_path / "checkpoint").tensors) == set(ARRAYS)
    for size in (3, 40):  # maps of msgpack begin in two ways
        tree = {"params": {f"{i}": {"kernel": np.full(2, i)} for i in range(size)}}
        (tmp_path / "flax_checkpoint_7").write_bytes(serialization.msgpack_serialize(tree))
        results = files.open_source(tmp_path / "flax_checkpoint_7").tensors
        assert set(results) == {f"{i}.kernel" for i in range(size)}
        np.testing.assert_array_equal(results["2.kernel"].read(), [2, 2])
    (tmp_path / "notes").write_text("weights of tomorrow")
    with pytest.raises(UserError, match="notes is not a known kind of file: weights end in"):
        files.open_source(tmp_path / "notes")


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_shards_are_found_by_any_index(index, tmp_path):
    parts = [{"a": ARRAYS["a"]}, {"b": ARRAYS["b"], "c": ARRAYS["c"]}]
    for i, part in enumerate(parts):
        write(tmp_path / f"part-{i}.safetensors", part)
    places = {name: f"part-{i}.safetensors" for i, part in enumerate(parts) for name in part}
    (tmp_path / index).write_text(json.dumps({"weight_map": places}))
    tensors = files.open_source(tmp_path).tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: ARRAYS[n].shape for n in "abc"}
    np.testing.assert_array_equal(tensors["c"].read(), 7)
