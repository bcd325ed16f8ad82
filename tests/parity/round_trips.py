"""Weights to a portable folder and back to the layout that they came in."""

import json

from safetensors.numpy import load_file

from imagegpt_jax.inference import export


def arrays(folder):
    """All arrays of a folder, in one file or shards."""
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


def check(path, tmp_path, kind):
    """The same names, dtypes and bits come back, and a config that says the same."""
    export.convert(path, tmp_path / "portable", kind=kind)
    export.convert(tmp_path / "portable", tmp_path / "back")
    before, after = arrays(path), arrays(tmp_path / "back")
    assert set(before) == set(after)
    for name, array in before.items():
        assert after[name].dtype == array.dtype, name
        assert after[name].tobytes() == array.tobytes(), name
    assert json.loads((path / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
