import importlib.util
import pathlib
import types

import pytest
from absl import flags

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import distributed

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("output", "said"),
    [("/proc/nope", "/proc/nope cannot be written"), ("/proc", "/proc cannot be written"),
     ("gs://bucket/trace", "a folder of this machine")],
)  # fmt: skip
def test_where_no_trace_can_be_written_is_told_before_anything_runs(monkeypatch, output, said):
    spec = importlib.util.spec_from_file_location("profile_step", ROOT / "tools" / "benchmarks" / "profile_step.py")
    tool = importlib.util.module_from_spec(spec)
    before = set(flags.FLAGS)
    spec.loader.exec_module(tool)
    for name in set(flags.FLAGS) - before:  # several tools have flags of one name
        delattr(flags.FLAGS, name)

    def start():
        raise AssertionError("started")

    monkeypatch.setattr(distributed, "initialize", start)
    monkeypatch.setattr(tool, "OUTPUT", types.SimpleNamespace(value=output))
    with pytest.raises(UserError, match=said):
        tool.main()
