import json
import os
import pathlib
import subprocess
import sys

import pytest

from imagegpt_jax.runtime import malloc

ROOT = pathlib.Path(__file__).resolve().parents[3]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "tools/benchmarks/benchmark.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def tool(load_tool):
    return load_tool("benchmarks/benchmark.py")


def reading(*seconds, gemm, **more):
    processor = [2 * s for s in seconds]
    return {"seconds": seconds, "processor_seconds": processor, "gemm_seconds": gemm, "parameters": 7, **more}


@pytest.fixture
def readings():
    ours = {"model_flops": 4e9, "losses": [9.0, 8.0]}
    return {
        # The product of two matrices of side 1000 is 2 GFLOP.
        "ours": [reading(1, 2, 9, gemm=[0.25, 0.25], **ours), reading(2, 3, 4, gemm=[0.25, 8.0], **ours)],
        "torch": [reading(4, gemm=[0.5], losses=[9.0, 7.0]), reading(6, gemm=[0.5], losses=[9.0, 7.0])],
    }


def test_medians_rates_and_ratios(tool, readings):
    summary = tool.summarise(readings, units=1000, side=1000)
    ours, torch = summary["ours"], summary["torch"]
    assert (ours["medians"], ours["seconds"]) == ([2, 3], 2.5)
    assert (torch["medians"], torch["seconds"]) == ([4, 6], 5)
    assert ours["units_per_second"] == 400
    assert ours["flops_per_second"] == 1.6e9
    assert (ours["gemm_flops_per_second"], torch["gemm_flops_per_second"]) == (8e9, 4e9)
    assert summary["gemm_flops_per_second"] == 8e9  # the better library's is the machine's
    assert (ours["share_of_gemm"], torch["share_of_gemm"]) == pytest.approx((0.2, 0.1))
    assert summary["ratio"] == 2
    assert summary["ratios"] == [2, 2]
    assert (ours["first_loss"], ours["last_loss"]) == (9, 8)


def test_table(tool, readings):
    text = tool.table({"decoder": tool.summarise(readings, units=1000, side=1000)})
    _, _, ours, torch, _, ratio = text.splitlines()
    assert ours == "| decoder | imagegpt_jax | 0.0 | 2.500 | 400 tokens/s | 2 | 20% |"
    assert torch.endswith("| 10% |")
    assert ratio == ("decoder: 4.0 GFLOP a step, GEMM 8 GFLOP/s; ours / PyTorch 2.00 (from 2.00 to 2.00 pair by pair).")


def test_floor_is_the_sum_of_the_fastest_parts(load_tool):
    benchmark_floor = load_tool("benchmarks/benchmark_floor.py")
    facts = {"parameters": 30, "model_flops": 1000}
    readings = {
        "ours": [
            {**facts, "product_seconds": [1, 9, 3, 10, 10, 10], "piece_seconds": [2, 9], "stream_seconds": 6},
            {**facts, "product_seconds": [3, 9, 3, 10, 10, 10], "piece_seconds": [4, 9], "stream_seconds": 6},
        ],
        "torch": [{**facts, "product_seconds": [4, 4, 4, 20, 20, 1], "piece_seconds": [5, 8], "stream_seconds": 12}],
    }
    # Two matrices of 2 x 3 and one of 3 x 1, with five tokens: 2 * 3 * 5 * (12 + 3) FLOPs. Ten numbers an array.
    sizes, others = [(2, 3, 2), (3, 1, 1)], {"attention": ([], 3), "loss": ([], 1)}
    parts = benchmark_floor.floor(readings, 110.0, 5, sizes, others, 10)
    assert parts["products"] == 2 * (2 + 4 + 3) + (10 + 10 + 1)
    assert parts["attention"] == (1000 - 450) / 110
    assert parts["optimizer"] == 7 * 30 * 6 / (3 * 10)
    assert parts["seconds"] == 39 + 5 + 42
    assert parts["pieces"] == {"attention": 3 * 3, "loss": 8}
    assert parts["assembled"] == 39 + 42 + 9 + 8
    text = benchmark_floor.text("decoder", {"floor": parts, "torch": {"seconds": 147}})
    assert text == (
        "Floor of the decoder's step: 86.000 s (products 39.000, attention 5.000, optimizer 42.000); PyTorch / that"
        " 1.71. The same products and optimizer, and the fastest of the two libraries' other pieces: 98.000 s"
        " (attention 9.000, loss 8.000); PyTorch / that 1.50."
    )


def test_the_floor_knows_all_matrices_of_the_full_decoder(load_tool):
    benchmark_floor = load_tool("benchmarks/benchmark_floor.py")
    workloads = load_tool("benchmarks/benchmark_workloads.py")
    sizes = benchmark_floor.matrices(workloads.decoder_config("full"))
    assert sum(inputs * outputs * count for inputs, outputs, count in sizes) == (
        12 * (4 * 768**2 + 3 * 768 * 2048) + 768 * 16384
    )


def test_every_side_has_its_process(tool, monkeypatch):
    from absl import flags

    ran = []

    def record(command, env, **_):
        ran.append((command[1].rpartition("/")[2], env.get(malloc.KEEP)))
        return subprocess.CompletedProcess(command, 0, "{}", "")

    monkeypatch.setattr(tool.subprocess, "run", record)
    monkeypatch.delenv(malloc.KEEP, raising=False)
    flags.FLAGS(["benchmark"])
    for name in tool.SIDES:
        assert tool.run_worker(name, "decoder") == {}
    assert ran == [("benchmark_jax.py", None), ("benchmark_jax.py", "0"), ("benchmark_torch.py", None)]


def test_without_torch_there_is_no_ratio(tool, readings):
    summary = tool.summarise({"ours": readings["ours"]}, units=1000, side=1000)
    assert "ratio" not in summary
    text = tool.table({"decoder": summary})
    assert "PyTorch" not in text
    assert len(text.splitlines()) == 5


def test_both_workloads_of_ours_run(tmp_path):
    output = tmp_path / "benchmark.json"
    done = run("train", "--size=test", "--ours_only", "--seconds=0", "--repeats=1", f"--output={output}")
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["versions"].keys() >= {"jax", "jaxlib", "python"}
    assert report["cores"] >= 1
    assert list(report["workloads"]) == ["decoder", "tokenizer"]
    for workload, summary in report["workloads"].items():
        floor = ["floor"] if workload == "decoder" else []
        assert list(summary) == ["model_flops", "gemm_flops_per_second", "ours", *floor]
        ours = summary["ours"]
        assert ours["last_loss"] < ours["first_loss"]  # it does train
        assert ours["seconds"] > 0
        assert len(ours["readings"][0]["gemm_seconds"]) == 10
        assert len(ours["readings"][0].get("product_seconds", ())) == (12 if floor else 0)
        assert len(ours["readings"][0].get("piece_seconds", ())) == (4 if floor else 0)
    assert "decoder: 0.0 GFLOP a step" in done.stdout
    parts = report["workloads"]["decoder"]["floor"]
    pieces = parts.pop("pieces")
    assert list(pieces) == ["attention", "norms", "activations", "loss"]
    assert min(*parts.values(), *pieces.values()) > 0
    assert parts["assembled"] == pytest.approx(parts["products"] + parts["optimizer"] + sum(pieces.values()))
    assert parts["seconds"] == pytest.approx(parts["products"] + parts["attention"] + parts["optimizer"])
    assert ("Other programs are running" in done.stderr) == (report["load_average"] > 0.5)


def test_the_full_decoder_is_the_one_that_is_claimed(load_tool):
    import jax

    from imagegpt_jax.tasks import decoder

    workloads = load_tool("benchmarks/benchmark_workloads.py")
    setup = decoder.setup_abstract(workloads.decoder_config("full"))
    state = jax.eval_shape(lambda key: decoder.init_state(setup, key), jax.eval_shape(jax.random.key, 0))
    # Twelve blocks of 4 D^2 + 3 D F + 2 D, the last norm, and two tables of 16384 codes and four marks.
    width, mlp_width = 768, 2048
    block = 4 * width**2 + 3 * width * mlp_width + 2 * width
    parameters = sum(x.size for x in jax.tree.leaves(state.trainable))
    assert parameters == 12 * block + width + 2 * (16384 + 4) * width
    batch = decoder.abstract_batch(setup, 4)
    scored = (setup.layout.pack(None, None, [[0] * 256])["weights"] > 0).sum()
    assert scored == 256
    products = 12 * (block - 2 * width) + 16384 * width
    attention = 12 * 2 * 256 * width  # causal: half of 4 L D
    assert decoder.step_flops(setup, "train", batch) == 3 * 4 * 256 * (2 * products + attention)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "say what to measure"),
        (("trian",), "unknown command 'trian'. Did you mean 'train'?"),
        (("train", "--workloads=decodr"), "unknown workload 'decodr'. Did you mean 'decoder'?"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, load_tool, capsys):
    from imagegpt_jax.errors import UserError

    tool = load_tool("benchmarks/benchmark.py", *(a for a in arguments if a.startswith("-")), "--ours_only")
    with pytest.raises((UserError, SystemExit)) as e:
        tool.COMMANDS[tool.take_command(["benchmark.py", *arguments])]()
    said = capsys.readouterr().err or f"error: {e.value}"
    assert words in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


def test_without_torch_it_says_what_to_install(tool, monkeypatch):
    from absl import flags

    from imagegpt_jax.errors import UserError

    flags.FLAGS(["benchmark"])
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[parity\]'"):
        tool.train()
