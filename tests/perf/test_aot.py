"""Programs of configs for slices that are not there: what goes into them, and what is reported of them."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import pytest
from absl import flags

from imagegpt_jax import cli, train_state
from imagegpt_jax.config import sibling
from imagegpt_jax.errors import UserError
from imagegpt_jax.perf import aot
from imagegpt_jax.runtime import hardware
from imagegpt_jax.tasks import interface
from imagegpt_jax.tasks.decoder import programs

V5E_8 = hardware.Topology("v5e-8", "v5e", "2x4")


class OneDevice(hardware.Topology):
    """A slice of this machine's first device."""

    def devices(self):
        return jax.devices()[:1]


def config_of(arg, task="decoder", **changes):
    config = sibling("configs/x.py", f"{task}.py").get_config(arg)
    config.update_from_flattened_dict(changes)
    return config


def lowered(plan, name):
    (program,) = (p for p in plan.programs() if p.name == name)
    with jax.set_mesh(plan.mesh):
        return program.lower()


def plan_of(arg, **changes):
    topology = OneDevice("v5e-1", "v5e", "1x1")
    config = config_of(arg, **{"model.depth": 2, "batch_size": 4, **changes})
    return aot.Plan(aot.fit(config, topology), topology)


# ----------------------------------------------------------------------------------------------- meshes and batches


@pytest.mark.parametrize(
    ("given", "slices", "mesh"),
    [
        ({}, 1, (1, -1, 1)),
        ({}, 2, (2, -1, 1)),
        ({"tensor": 2}, 2, (2, -1, 2)),
        ({"tensor": 2, "fsdp": 1}, 2, (-1, 1, 2)),
        ({"data": 4}, 2, (4, -1, 1)),
        ({"data": -1}, 1, (-1, 1, 1)),
        ({"data": 2, "fsdp": 4, "tensor": 2}, 2, (2, 4, 2)),
    ],
)
def test_given_sizes_stay_and_one_axis_fills(given, slices, mesh):
    assert aot.filled(given, slices) == dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))


@pytest.fixture
def command_line(monkeypatch):
    """Sets --config and its overrides as a tool would, and gives the config."""

    def give(*arguments):
        monkeypatch.setattr(sys, "argv", ["tool", "--config=configs/decoder.py:size=test", *arguments])
        holder = cli.define_config()
        flags.FLAGS(sys.argv)
        return holder.value

    yield give
    for name in [name for name in flags.FLAGS if name == "config" or name.startswith("config.")]:
        delattr(flags.FLAGS, name)


def test_a_mesh_of_the_command_line_is_kept_on_any_slice(command_line):
    config = command_line("--config.mesh.tensor=2", "--config.mesh.fsdp=1")
    two = hardware.Topology("v5e-8", "v5e", "2x4", 2)
    assert aot.fit(config, two).mesh.to_dict() == {"data": -1, "fsdp": 1, "tensor": 2}
    assert aot.fit(config, two).batch_size == 8
    with pytest.raises(UserError, match="does not fit 9 devices"):
        aot.fit(config, hardware.Topology("v5e-9", "v5e", "3x3"))


@pytest.mark.parametrize(("given", "accumulate"), [((), 4), (("--config.accumulate=1",), 1)])
def test_the_parts_of_a_batch_are_those_of_the_command_line(command_line, given, accumulate):
    """Of 4 Mi rows a device 14 GiB of the blocks' inputs are kept, and 16 GiB is what it has."""
    config = command_line("--config.batch_size=33554432", *given)
    assert aot.fit(config, V5E_8).accumulate == accumulate


def test_without_a_command_line_fsdp_fills():
    assert aot.fit(config_of("size=test"), V5E_8).mesh.to_dict() == {"data": 1, "fsdp": -1, "tensor": 1}


@pytest.mark.parametrize("task", ["decoder", "tokenizer"])
def test_a_batch_in_no_parts_is_refused(task):
    with pytest.raises(UserError, match="accumulate=0 is not possible: use 1 or more"):
        aot.fit(config_of("size=test", task, accumulate=0), V5E_8)


# ------------------------------------------------------------------------------------------- images and token shards


def trained(plan):
    return next(plan.programs())


@pytest.mark.parametrize(
    ("train", "inputs"),
    [
        ("tfds:imagenet2012,split=train", "images"),
        ("emoji:train,res=16", "images"),
        ("folder:/data/tokens:all", "images"),
        ("tokens:runs/tokens/train", "tokens"),
        ("0.7*tokens:a + 0.3*tokens:b", "tokens"),
    ],
)
def test_a_step_is_given_what_the_config_names(train, inputs):
    assert programs.inputs_of(config_of("size=test", **{"data.train": train})) == inputs


def test_a_decoder_is_compiled_for_either_and_a_tokenizer_for_images():
    shards, photos = config_of("size=test", **{"data.train": "tokens:a"}), config_of("size=test")
    assert programs.with_inputs(shards, "tokens").data.train == "tokens:a"
    assert programs.with_inputs(photos, "images").data.train == photos.data.train
    made = programs.with_inputs(photos, "tokens")
    assert programs.inputs_of(made) == "tokens" != programs.inputs_of(photos)
    tokenizer = config_of("size=test", "tokenizer")
    assert interface.find("tokenizer").perf.with_inputs(tokenizer, "tokens").to_dict() == tokenizer.to_dict()
    with pytest.raises(UserError, match=r"data.train=tokens:a are token shards: leave out --inputs=images"):
        programs.with_inputs(shards, "images")


def test_a_step_that_is_given_images_holds_them_and_the_frozen_tokenizer():
    images, tokens = plan_of("size=test"), plan_of("size=test", **{"data.train": "tokens:shards"})
    step = lowered(images, "train").args_info[0]
    assert step[2]["image"].shape == (4, 16, 16, 3)
    assert "image" not in lowered(tokens, "train").args_info[0][2]
    held = {name: train_state.held_bytes(trained(plan).parameters()) for name, plan in (("i", images), ("t", tokens))}
    assert held["i"] - held["t"] == train_state.held_bytes(images.state.frozen["tokenizer"]) > 0


def test_encoding_counts_as_flops_of_the_step():
    """16 codes: a convolution in, three blocks of two and one out, 16 channels wide; their last product; 64 codes."""
    convolutions = 9 * (48 * 16 + 7 * 16 * 16)
    image = 2 * 16 * (convolutions + 16 * 8 + 8 * 64)
    images, tokens = plan_of("size=test"), plan_of("size=test", **{"data.train": "tokens:shards"})
    assert trained(images).model_flops - trained(tokens).model_flops == 4 * image


def test_codes_in_random_order_are_encoded_with_their_order():
    plan = plan_of("recipe=rar_B")
    batch = plan.task.abstract_batch(plan.setup, 2)
    assert batch["order"].shape == (2, 256)
    assert batch["image"].shape == (2, 256, 256, 3)


# ----------------------------------------------------------------------------------------------------------- sampling


def test_sampling_is_traced_only_where_it_is_asked_for(monkeypatch):
    def never(*_):
        raise AssertionError("traced")

    monkeypatch.setattr(programs, "prepare", never)
    assert [p.name for p in plan_of("size=test").programs()] == ["train", "prefill", "decode"]
    with pytest.raises(AssertionError, match="traced"):
        lowered(plan_of("size=test"), "prefill")


def test_target_positions_and_conditions_go_into_sampling():
    plan = plan_of("recipe=rar_B")
    assert plan.setup.model.target_positions
    scores_RV, cache = lowered(plan, "prefill").out_info
    assert scores_RV.shape == (8, 1024)
    assert cache.capacity == 2 + 256 - 1  # the class, <boi>, all codes but the last
    step = lowered(plan, "decode")
    assert step.out_info[0].shape == (8, 1024)
    assert [x.shape for x in jax.tree.leaves(step.args_info[0][2][3])] == [(8, 3)]
    assert step.args_info[0][3].condition.shape == (8,)


def test_features_of_words_go_into_prefill_and_its_cache():
    plan = plan_of("recipe=llamagen_t2i_XL")
    prefill = lowered(plan, "prefill")
    assert prefill.args_info[0][1].features.shape == (8, 120, 2048)
    assert prefill.out_info[1].capacity == 120 + 1 + 256 - 1
    flops = {p.name: p.model_flops for p in plan.programs()}
    assert flops["prefill"] > 50 * flops["decode"]  # 120 tokens, as the last feature stands for <boi>


# ------------------------------------------------------------------------------------------------------- many devices

CODE = """
    import json
    import jax
    from imagegpt_jax.perf import aot
    from imagegpt_jax.runtime import hardware
    from imagegpt_jax.config import sibling

    class Here(hardware.Topology):
        def devices(self):
            return jax.devices()

    def plan(task, arg, slices=1, **changes):
        config = sibling("configs/x.py", f"{task}.py").get_config(arg)
        config.update_from_flattened_dict(changes)
        topology = Here("x", "v5e", "2x4" if slices == 1 else "2x2", slices)
        fitted = aot.fit(config, topology)
        return aot.Plan(fitted if "mesh.data" not in changes else config, topology)

    def replicated(plan):
        return {p.name: aot.largest_replicated(p.parameters()) for p in plan.programs()}

    wide = {"model.width": 1024, "model.depth": 1}
    whole = {"mesh.data": -1, "mesh.fsdp": 1, "loss.lpips": 1.0}
    print(json.dumps({
        "fsdp": replicated(plan("decoder", "size=test", **wide)),
        "frozen": replicated(plan("tokenizer", "size=test", **whole)),
        "shards": plan("decoder", "size=test", **wide, **{"data.train": "tokens:shards"}).bound(),
        "images": plan("decoder", "size=test", **wide).bound(),
        "one": plan("decoder", "size=test", **wide, **{"mesh.data": 2, "mesh.fsdp": 4}).bound(),
        "two": plan("decoder", "size=test", 2, **wide).bound(),
    }))
"""


@pytest.fixture(scope="module")
def told():
    """What plans on eight virtual devices say."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_program_tells_of_its_own_parameters(told):
    """Training cuts all large ones over `fsdp`; sampling has every table whole on every device."""
    config = config_of("size=test")
    assert told["fsdp"]["train"] < 1 << 20
    ids = 4 + config.data.text_vocab_size + config.untrained_tokenizer.model.quantizer.num_codes
    assert told["fsdp"]["prefill"] == told["fsdp"]["decode"] == 4 * 1024 * ids


def test_frozen_parameters_count_and_so_do_those_of_a_mesh_that_cuts_none(told):
    assert told["frozen"]["reconstruction"] == 512 * 512 * 3 * 3 * 4  # of VGG-16


def test_what_encodes_images_is_gathered_once(told):
    """Of the tokenizer's parameters those of its encoder, all matrices of which are cut into eight parts, in bf16."""
    convolutions = 9 * (48 * 16 + 7 * 16 * 16) + 16 * 8 + 64 * 8
    gathered = {name: told[name]["all-gather"] for name in ("shards", "images")}
    assert gathered["images"] - gathered["shards"] == pytest.approx(2 * convolutions * 7 / 8, rel=0.05)
    assert told["images"]["reduce-scatter"] == told["shards"]["reduce-scatter"]


def test_sums_between_slices_have_a_bound_of_their_own(told):
    one, two = told["one"], told["two"]
    assert "between-slices" not in one
    assert two["between-slices"] > 0.9 * one["all-reduce"]  # all but what a slice has several copies of
    assert two["between-slices"] + two["all-reduce"] == pytest.approx(one["all-reduce"], abs=1)
    assert {k: two[k] for k in ("all-gather", "reduce-scatter")} == {
        k: one[k] for k in ("all-gather", "reduce-scatter")
    }
