"""What the TPU compiler says of small programs."""

import pytest

from imagegpt_jax.config import sibling
from imagegpt_jax.perf import aot
from imagegpt_jax.runtime import hardware

V5E_8 = hardware.Topology("v5e-8", "v5e", "2x4")


@pytest.fixture
def compiled(load_tool):
    """`compiled(arg, topology, names, **changes)` is the reports of a decoder's programs."""
    pytest.importorskip("libtpu")
    reports = load_tool("scale/reports.py")

    def told(arg, topology, names, **changes):
        config = sibling("configs/x.py", "decoder.py").get_config(arg)
        config.update_from_flattened_dict(changes)
        plan = aot.Plan(aot.fit(config, topology), topology)
        return {p.name: reports.compile_program(plan, p, effort=-1.0)[0] for p in plan.programs() if p.name in names}

    return told


def test_sampling_s_time_is_that_of_what_it_reads_and_writes(compiled):
    results = compiled("size=B", V5E_8, ("prefill", "decode"), **{"model.depth": 1, "batch_size": 32})
    seconds = {name: report["roofline_estimate_seconds"]["hbm"] for name, report in results.items()}
    rate = V5E_8.chip.hbm_bandwidth
    assert seconds["decode"] == pytest.approx(results["decode"]["bytes_accessed"] / rate, abs=1e-6)
    prefill = results["prefill"]
    assert prefill["argument_bytes"] >= results["decode"]["weights_bytes"]  # the table that scores included
    assert prefill["argument_bytes"] / rate < seconds["prefill"] < 2 * prefill["argument_bytes"] / rate


def test_tensor_sends_little_more_than_its_bound(compiled):
    """A sum to columns is scattered, and tables stay cut over `tensor` while `fsdp` gathers them."""
    topology = hardware.Topology("v5e-16", "v5e", "4x4")
    changes = {"mesh.tensor": 2, "data.train": "tokens:shards"}
    report = compiled("size=B", topology, ("train",), **changes)["train"]
    sums = report["collectives"]["all-reduce"]
    assert sums["bytes"] < 0.75 * sums["bound_bytes"]  # three of the five sums of a block: the other two are scattered
    assert report["collective_bytes"] < 1.2 * report["collective_bound_bytes"]


def test_what_crosses_slices_is_reported_beside_its_bound(compiled):
    topology = hardware.Topology("v5e-4", "v5e", "2x2", 2)
    report = compiled("size=test", topology, ("train",), **{"model.depth": 1})["train"]
    crossing = report["collectives"]["between-slices"]
    assert crossing["bytes"] >= crossing["bound_bytes"] > 0
    seconds = report["roofline_estimate_seconds"]
    assert seconds["dcn"] == pytest.approx(crossing["bytes"] / 3.125e9, abs=1e-6)
    others = report["collective_bytes"] - crossing["bytes"]
    assert seconds["ici"] == pytest.approx(others / topology.chip.ici_bandwidth, abs=1e-6)
