"""`compile_ahead.py` with a compiler that answers as told; what the real one says is kept in docs/scale.json."""

import json
import pathlib
import types

import pytest
from absl import flags

from imagegpt_jax import config as config_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.perf import aot
from imagegpt_jax.tasks.decoder import programs

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def tool(monkeypatch, load_tool):
    """`tool(large=[...], **flags)` is the tool where the programs in `large` do not fit."""
    module = load_tool("scale/compile_ahead.py")
    module.help = flags.FLAGS["programs"].help
    load_tool.forget()  # they are set below
    import reports

    monkeypatch.setattr(module, "describe", lambda report: f"compiled {report['program']}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def told(large=(), **values):
        compiled = module.compiled = []

        class Plan:
            def __init__(self, config, topology):
                self.config = module.given = config

            def programs(self):
                return [types.SimpleNamespace(name=name) for name in ("train", "prefill", "decode")]

        def compile_program(plan, program, options=None, effort=0.0):
            compiled.append(program.name)
            if program.name in large:
                raise reports.OutOfMemory("RESOURCE_EXHAUSTED: 129.88G exceeds 95.74G")
            return {"program": program.name}, "HLO"

        monkeypatch.setattr(aot, "Plan", Plan)
        monkeypatch.setattr(reports, "compile_program", compile_program)
        config = config_lib.sibling(str(ROOT / "configs" / "x.py"), "decoder.py").get_config("size=test")
        values = {"config": config, "topology": "v5e-16", "slices": 1, "batch_size": 512, "programs": [], "xla": "",
                  "output": None, "hlo": None, "effort": 0.0, "inputs": "tokens"} | values  # fmt: skip
        for name, value in values.items():
            monkeypatch.setattr(module, name.upper(), types.SimpleNamespace(value=value))
        return module

    return told


def test_a_program_that_does_not_fit_does_not_take_the_others_with_it(tool, tmp_path, capsys):
    output = tmp_path / "new" / "cells.json"
    with pytest.raises(
        UserError, match=r"prefill does not fit v5e-16 at batch 512 \(64 rows a device\): give a smaller"
    ):
        tool(large=["prefill"], output=str(output), hlo=str(tmp_path / "hlo")).main()
    assert [report["program"] for report in json.loads(output.read_text())] == ["train", "decode"]
    assert {path.name for path in (tmp_path / "hlo").iterdir()} == {"train.txt", "decode.txt"}
    assert "129.88G" in capsys.readouterr().err


@pytest.mark.parametrize("inputs", ["tokens", "images"])
def test_a_step_is_given_what_the_flag_says(tool, inputs):
    module = tool(inputs=inputs)
    module.main()
    assert programs.inputs_of(module.given) == inputs


def test_what_was_compiled_is_there_whatever_ends_the_next(tool, tmp_path, monkeypatch):
    output = tmp_path / "cells.json"
    module = tool(output=str(output))
    import reports

    compile_one = reports.compile_program

    def interrupted(plan, program, options=None, effort=0.0):
        if program.name == "decode":
            raise KeyboardInterrupt
        return compile_one(plan, program, options, effort)

    monkeypatch.setattr(reports, "compile_program", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert [report["program"] for report in json.loads(output.read_text())] == ["train", "prefill"]


def test_a_step_that_does_not_fit_can_also_be_cut_into_parts(tool):
    with pytest.raises(UserError) as e:
        tool(large=["train"], topology="v5e-8", slices=2, programs=["train"]).main()
    assert str(e.value) == (
        "train does not fit 2 x v5e-8 at batch 512 (32 rows a device at a time): give a smaller --batch_size or a"
        " larger --config.accumulate."
    )


@pytest.mark.parametrize("flag", ["output", "hlo"])
def test_what_cannot_be_written_is_told_before_anything_is_compiled(tool, flag):
    module = tool(**{flag: "/proc/nope/t"})
    with pytest.raises(UserError, match="/proc/nope/.* cannot be written"):
        module.main()
    assert not module.compiled


def test_help_lists_the_programs_of_every_task(tool):
    from imagegpt_jax.tasks import decoder, tokenizer

    config = config_lib.sibling(str(ROOT / "configs" / "x.py"), "tokenizer.py").get_config("size=test")
    names = {
        *tokenizer.TASK.phases(tokenizer.TASK.setup_abstract(config)),
        *decoder.TASK.phases(None),
        "prefill",
        "decode",
    }
    assert {"train", "adversarial"} <= names
    assert not [name for name in names if name not in tool().help]
