import functools
import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest

from imagegpt_jax import train_state
from imagegpt_jax.config import sibling
from imagegpt_jax.errors import UserError
from imagegpt_jax.parallel import sharding
from imagegpt_jax.tasks import decoder
from imagegpt_jax.training.steps import Steps, compiler_options

_spec = importlib.util.spec_from_file_location("tiny_task", pathlib.Path(__file__).parents[1] / "tiny_task.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def test_options_of_other_platforms_are_left_out():
    text = "xla_tpu_a=1,xla_cpu_b=x=y,xla_tpu_c=false,xla_dump_to=/folder"
    assert compiler_options(text, "tpu") == {"xla_tpu_a": "1", "xla_tpu_c": False, "xla_dump_to": "/folder"}
    assert compiler_options(text, "cpu") == {"xla_cpu_b": "x=y", "xla_dump_to": "/folder"}
    assert compiler_options("", "tpu") == {}


@pytest.mark.parametrize("text", ["xla_tpu_a", "xla_tpu_a=", "a=1", "=1", "xla_a=1; xla_b=2,xla_c"])
def test_options_of_another_form_are_refused(text):
    with pytest.raises(UserError, match="xla_name=value"):
        compiler_options(text, "tpu")


def _loss(options):
    task, config = tiny.Task(), tiny.make_config(compiler_options=options)
    setup, mesh = task.setup(config), sharding.make_mesh(config.mesh, jax.devices()[:1])
    batch = {"x": np.ones((4, 3), np.float32), "y": np.ones(4, np.float32)}
    with jax.set_mesh(mesh):
        state, layout = train_state.init_sharded(functools.partial(task.init_state, setup), setup.networks, mesh, 0)
        steps = Steps(task, setup, mesh, layout)
        _, totals = steps("train", state, steps.zeros("train", state, batch), batch)
    return float(totals["metrics"]["loss"].compute())


def test_options_reach_the_compiler_of_the_step(tmp_path):
    loss = _loss("")
    dumped = _loss(f"xla_tpu_not_for_this_machine=1,xla_dump_to={tmp_path},xla_dump_hlo_as_text=true")
    assert dumped == loss
    assert list(tmp_path.glob("*step*after_optimizations.txt"))
    for bad in ("xla_cpu_no_such_option=1", "xla_cpu_enable_fast_math=maybe"):
        with pytest.raises(UserError, match=f"refuses .*{bad}"):
            _loss(bad)


def test_on_cpu_the_step_copies_nothing_of_the_optimizers_state():
    config = sibling("configs/decoder.py", "decoder.py").get_config("size=test")
    copied = {}
    for options in (config.compiler_options, ""):
        config.compiler_options = options
        setup, mesh = decoder.setup_abstract(config), sharding.make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            make = functools.partial(decoder.init_state, setup)
            state, layout = train_state.init_sharded(make, setup.networks, mesh, config.seed)
            batch = sharding.put_batch(setup.layout.pack(None, None, np.zeros((4, setup.layout.num_codes), int)), mesh)
            compiled = Steps(decoder.TASK, setup, mesh, layout).lower("train", state, batch).compile()
        copied[options] = re.findall(r"copy\(%state_opt__decoder\w*(?:mu|nu)__", compiled.as_text())
    assert copied.pop("")
    assert list(copied.values()) == [[]]
