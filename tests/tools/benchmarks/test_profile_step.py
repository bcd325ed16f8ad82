import types

import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import distributed


@pytest.mark.parametrize(
    ("output", "said"),
    [("/proc/nope", "/proc/nope cannot be written"), ("/proc", "/proc cannot be written"),
     ("gs://bucket/trace", "a folder of this machine")],
)  # fmt: skip
def test_where_no_trace_can_be_written_is_told_before_anything_runs(monkeypatch, load_tool, output, said):
    tool = load_tool("benchmarks/profile_step.py")

    def start():
        raise AssertionError("started")

    monkeypatch.setattr(distributed, "initialize", start)
    monkeypatch.setattr(tool, "OUTPUT", types.SimpleNamespace(value=output))
    with pytest.raises(UserError, match=said):
        tool.main()
