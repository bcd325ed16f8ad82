import functools
import json
import pathlib
import types

import pytest

from imagegpt_jax import config as config_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import hardware

ROOT = pathlib.Path(__file__).resolve().parents[3]
LIMIT = 900


@pytest.mark.parametrize(
    ("peak", "largest", "most"),
    [
        (lambda b: 100 + 8 * b, 100, 6),  # a straight line
        (lambda b: max(300, 100 + 2 * b), 400, 10),  # small batches peak elsewhere
        (lambda b: max(300, 100 + 2 * b) if b < 300 else None, 299, 20),  # the compiler gives up below the limit
        (lambda b: 100 + b * b // 50, 200, 16),  # a curve
        (lambda b: 890 + 10 * b, 1, 3),
        (lambda b: LIMIT + b, 0, 1),
        (lambda b: None, 0, 1),
    ],
)
def test_the_largest_batch_is_found_in_few_looks_and_the_next_was_looked_at(load_tool, peak, largest, most):
    plan_search = load_tool("scale/plan_search.py")
    looked = {}

    @functools.cache
    def recorded(batch):
        looked[batch] = peak(batch)
        return looked[batch]

    assert plan_search.largest(recorded, LIMIT) == largest
    assert largest + 1 in looked
    assert len(looked) <= most


@pytest.fixture
def plan(monkeypatch, load_tool):
    """The tool, with the compiler's answers as told: `plan(config, topology, peak)` sets its flags and returns it."""
    from imagegpt_jax.perf import aot
    from imagegpt_jax.tasks.decoder import programs

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    tool = load_tool("scale/plan.py")
    load_tool.forget()  # they are set below
    monkeypatch.setattr(tool, "table", lambda plan, peak: "")
    import reports

    monkeypatch.setattr(reports, "versions", lambda: {"jax": "1"})

    def told(config, topology, peak, **values):
        efforts = tool.efforts = []

        class Plan:
            task = types.SimpleNamespace(phases=lambda setup: ("train",))
            setup = None

            def __init__(self, config, topology):
                self.config, self.inputs = config, programs.inputs_of(config)

            def programs(self):
                yield "train"
                raise AssertionError("programs of sampling are not asked for")

        def compile_program(plan, program, options=None, effort=0.0):
            efforts.append(effort)
            return {"peak_bytes": peak(plan.config)}, ""

        monkeypatch.setattr(aot, "Plan", Plan)
        monkeypatch.setattr(reports, "compile_program", compile_program)
        values = {
            "config": config,
            "topology": topology,
            "slices": 1,
            "share": 0.9,
            "output": None,
            "effort": 0.0,
            "inputs": "tokens",
        } | values
        for name, value in values.items():
            monkeypatch.setattr(tool, name.upper(), types.SimpleNamespace(value=value))
        return tool

    return told


def decoder():
    return config_lib.sibling(str(ROOT / "configs" / "x.py"), "decoder.py").get_config("size=test")


def accumulating(config, by):
    """A peak that lets each device of v5e-16 have five examples at a time."""
    assert config.accumulate == by
    return config.batch_size // (16 * by) * (16 * hardware.GIB * 0.9 / 5.5)


def test_the_answer_is_all_that_was_compiled_with(plan, capsys, tmp_path):
    config = decoder()
    config.accumulate, config.mesh = 4, {"data": 2, "fsdp": -1, "tensor": 1}
    output = tmp_path / "new" / "plan.json"
    tool = plan(config, "v5e-8", lambda c: accumulating(c, 4), slices=2, output=str(output), effort=-1.0)
    tool.main()
    said = capsys.readouterr().out
    assert "largest batch of tokens: 320 (20 a device, 5 in each of 4 parts); cheapest remat at it: 'none'" in said
    assert "384 (24 a device, 6 in each of 4 parts) with remat 'full' peaks at" in said
    assert said.splitlines()[-1] == (
        "set: --config.batch_size=320 --config.accumulate=4 --config.model.remat=none --config.mesh.data=2"
        " --config.mesh.fsdp=8 --config.mesh.tensor=1"
    )
    answer = json.loads(output.read_text())
    assert {key: answer[key] for key in ("topology", "slices", "mesh", "accumulate", "batch_size", "per_device")} == {
        "topology": "v5e-8",
        "slices": 2,
        "mesh": {"data": 2, "fsdp": 8, "tensor": 1},
        "accumulate": 4,
        "batch_size": 320,
        "per_device": 20,
    }
    assert answer["config"]["batch_size"] == 320
    assert answer["config"]["model"]["remat"] == "none"
    assert answer["inputs"] == "tokens"
    assert answer["versions"] == {"jax": "1"}
    assert (384, 24, "full") in [(t["batch_size"], t["per_device"], t["remat"]) for t in answer["tried"]]
    assert set(tool.efforts) == {-1.0}


def test_without_parts_a_device_has_its_rows_at_once(plan, capsys):
    plan(decoder(), "v5e-16", lambda c: accumulating(c, 1), inputs="images").main()
    assert "largest batch of images: 80 (5 a device); cheapest remat at it: 'none'" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["/proc/nope/plan.json", "/proc/plan.json"])
def test_what_cannot_be_written_is_told_before_anything_is_compiled(plan, output):
    def peak(config):
        raise AssertionError("compiled")

    with pytest.raises(UserError, match=f"{output} cannot be written"):
        plan(decoder(), "v5e-16", peak, output=output).main()
