import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def sampling(load_tool):
    return load_tool("benchmarks/benchmark_sampling.py")


def reading(*seconds, peak=0):
    return {"seconds": seconds, "peak_rss_bytes": peak, "imports_rss_bytes": 10, "versions": {}}


def test_rows_ratios_and_text(sampling):
    work = sampling.Workload(images=2, side=2)  # 8 tokens in all
    ours, _, _, _, llamagen, _, *others = sampling.LINES
    readings = {
        ours: [reading(1, 2, 9, peak=100), reading(4, peak=90), reading(0.5, peak=80)],
        llamagen: [reading(8), reading(8), reading(8)],
    } | {line: [reading(4 + i)] * 3 for i, line in enumerate(others)}
    rows = sampling.rows(readings, work, [40e9, 80e9, 20e9])
    assert (rows[0]["system"], rows[0]["mode"], rows[0]["dtype"]) == ("imagegpt_jax", "plain", "float32")
    assert rows[0]["readings"] == [4, 2, 16]  # of each process the median
    assert rows[0]["tokens_per_second"] == 4
    assert (rows[0]["peak_rss_bytes"], rows[0]["peak_rss_over_imports_bytes"]) == (100, 90)
    assert rows[-1]["system"] == "bound"
    assert rows[-1]["tokens_per_second"] == pytest.approx(2 * 40e9 / (4 * work.read_per_step))
    ratios = sampling.ratios(rows)
    assert ratios["ours / LlamaGen's sampler"] == 4
    assert ratios["ours / best of transformers"] == 2
    assert ratios["bound / ours"] == rows[-1]["tokens_per_second"] / 4
    assert "| imagegpt_jax | plain | float32 | 4.0 | 0 |" in sampling.text(rows)


def test_the_bound_reads_weights_and_half_a_cache(sampling):
    work = sampling.Workload()
    blocks = 12 * (4 * 768**2 + 3 * 768 * 2048)
    cache = 8 * 12 * 2 * 128 * 768  # rows, layers, keys and values, slots, width
    assert work.read_per_step == blocks + 16384 * 768 + cache
    assert 3e9 < sampling.bandwidth(2**24) < 1e12


def test_our_lines_run(tmp_path):
    output = tmp_path / "sampling.json"
    command = [sys.executable, "tools/benchmarks/benchmark.py", "sample", "--size=test", "--ours_only", "--seconds=0"]
    done = subprocess.run(
        [*command, "--repeats=1", f"--output={output}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["versions"].keys() >= {"jax", "jaxlib", "python"}
    assert [(r["system"], r["mode"], r["dtype"]) for r in report["rows"]] == [
        ("imagegpt_jax", "plain", "float32"),
        ("imagegpt_jax", "plain", "bfloat16"),
        ("imagegpt_jax", "int8", "float32"),
        ("imagegpt_jax", "speculative", "float32"),
        ("bound", "weights and cache read once a step", "float32"),
    ]
    plain, brain, int8, speculative, bound = report["rows"]
    assert (plain["steps"], 1 < speculative["steps"] <= 16) == (16, True)
    assert all(row["tokens_per_second"] > 0 and row["peak_rss_bytes"] > 0 for row in report["rows"])
    assert plain["tokens_per_second"] < bound["tokens_per_second"]
    # Matrices at four, two and one byte a number.
    assert plain["weights_bytes"] > 1.9 * brain["weights_bytes"]
    assert int8["weights_bytes"] < 0.75 * plain["weights_bytes"]
    assert plain["cache_bytes"] == 4 * (4 * 2 * 2 * 17 * 32) + 4 * 4 * 17 + 4
