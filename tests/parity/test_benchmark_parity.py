"""Both sides of `tools/benchmarks/benchmark.py train` train the same networks, and time the same pieces of them."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.parity

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_both_libraries_compute_the_same_pieces(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "benchmarks"))
    import benchmark_pieces
    import benchmark_pieces_torch
    import benchmark_workloads as workloads

    shapes = benchmark_pieces.shapes(workloads.decoder_config("test"))
    ours, theirs = benchmark_pieces.pieces(), benchmark_pieces_torch.pieces()
    assert list(ours) == list(theirs) == list(shapes)
    rng = np.random.default_rng(0)
    for name, (of_inputs, _) in shapes.items():
        inputs = [rng.normal(size=shape).astype(np.float32) for shape in of_inputs]
        y, back = jax.vjp(ours[name], *inputs)
        tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
        expected = theirs[name](*tensors)
        np.testing.assert_allclose(y, expected.detach(), atol=1e-5)
        gradients = torch.autograd.grad(expected, tensors, torch.ones_like(expected))
        for computed, gradient in zip(back(jnp.ones_like(y)), gradients, strict=True):
            np.testing.assert_allclose(computed, gradient, atol=1e-5)


@pytest.mark.parametrize("workload", ["decoder", "tokenizer"])
def test_torch_trains_a_network_of_the_same_size(workload):
    results = {}
    for script in ("benchmark_jax.py", "benchmark_torch.py"):
        done = subprocess.run(
            [sys.executable, f"tools/benchmarks/{script}", f"--workload={workload}", "--size=test", "--seconds=0"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        results[script] = json.loads(done.stdout.splitlines()[-1])
    ours, torch = results.values()
    marks = 2 * 4 * 32 if workload == "decoder" else 0  # rows of the four marks, in two tables
    assert ours["parameters"] - marks == torch["parameters"]
    assert torch["losses"][-1] < torch["losses"][0]
