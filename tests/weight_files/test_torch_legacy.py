"""Files of PyTorch from before version 1.6, written here byte by byte as torch.save wrote them."""

import pickle
from typing import ClassVar

import numpy as np
import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.weight_files import torch_file, torch_legacy


class Name:
    """Is pickled as a global of any name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Storage:
    def __init__(self, kind, key, size):
        self.pid = ("storage", Name("torch", kind), key, "cpu", size, None)


class Tensor:
    def __init__(self, storage, start, shape, strides):
        self.arguments = (storage, start, shape, strides, False, {})


class Pickler(pickle._Pickler):
    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None

    def save_name(self, obj):
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_tensor(self, obj):
        self.save(Name("torch._utils", "_rebuild_tensor_v2"))
        self.save(obj.arguments)
        self.write(pickle.REDUCE)

    dispatch[Name] = save_name
    dispatch[Tensor] = save_tensor


def write(path, tree, storages, little=True):
    with path.open("wb") as file:
        for value in (torch_legacy.MAGIC, 1001, {"protocol_version": 1001, "little_endian": little}):
            pickle.dump(value, file, protocol=2)
        Pickler(file, protocol=2).dump(tree)
        pickle.dump(list(storages), file, protocol=2)
        for array in storages.values():
            file.write(np.int64(array.size).tobytes() + array.tobytes())


@pytest.fixture
def file(tmp_path):
    first, second = np.arange(12, dtype=np.float32), np.arange(4, dtype=np.int64)
    tree = {
        "a.weight": Tensor(Storage("FloatStorage", "140", 12), 0, (3, 4), (4, 1)),
        "a.turned": Tensor(Storage("FloatStorage", "140", 12), 2, (2, 3), (1, 4)),
        "b": {"count": Tensor(Storage("LongStorage", "92", 4), 3, (), ())},
    }
    write(tmp_path / "x.pth", tree, {"92": second, "140": first})
    return tmp_path / "x.pth"


def test_tensors_and_views_of_them(file):
    results = torch_file.tensors(torch_file.read(file))
    assert results.keys() == {"a.weight", "a.turned", "b.count"}
    np.testing.assert_array_equal(results["a.weight"].read(), np.arange(12, dtype=np.float32).reshape(3, 4))
    np.testing.assert_array_equal(results["a.turned"].read(), [[2, 6, 10], [3, 7, 11]])
    assert results["b.count"].read() == 3


def test_names_that_are_not_allowed(tmp_path):
    write(tmp_path / "x.pth", {"a": Name("os", "system")}, {})
    with pytest.raises(UserError, match="names os.system"):
        torch_file.read(tmp_path / "x.pth")


@pytest.mark.parametrize("cut", [3, 60, 200, -5])
def test_files_that_were_cut_short(file, cut):
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match="cut short|damaged"):
        torch_file.read(file)


@pytest.mark.parametrize("data", [b"", b"no pickle at all", pickle.dumps({"a": 1})])
def test_other_files(tmp_path, data):
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(UserError, match="not written by torch.save|not a file of PyTorch's"):
        torch_file.read(tmp_path / "x.pth")


def test_the_other_byte_order(tmp_path):
    write(tmp_path / "x.pth", {}, {}, little=False)
    with pytest.raises(UserError, match="other byte order"):
        torch_file.read(tmp_path / "x.pth")
