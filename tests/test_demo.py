"""The whole way, through the binaries as a user runs them: `make demo` at `size=test`."""

import json
import subprocess
import sys

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    command = [sys.executable, "-m", "imagegpt_jax", "demo", "--size=test", f"--output={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_metrics_are_one_flat_object_with_the_promised_keys(demo):
    out, _ = demo
    scores = json.loads((out / "metrics.json").read_text())
    assert not any(isinstance(v, dict | list) for v in scores.values())
    for key in (
        "tokenizer/val_psnr",
        "tokenizer/codebook_usage",
        "decoder/val_image_bits_per_token",
        "decoder/unigram_image_bits_per_token",
        "generation/retrieval_top1",
        "generation/retrieval_top1_shuffled",
    ):
        assert isinstance(scores[key], float), key
    assert 0 < scores["tokenizer/codebook_usage"] <= 1


def test_pictures_are_there(demo):
    out, _ = demo
    with Image.open(out / "samples" / "grid.png") as grid:
        assert grid.width > 100
        assert grid.height > 100
    assert (out / "reconstructions.png").exists()
    rows = [json.loads(line) for line in (out / "samples" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 48
    assert len({row["prompt"] for row in rows}) == 12


def test_logs_of_both_stages_are_there(demo):
    out, _ = demo
    for stage in ("tokenizer", "decoder"):
        assert list((out / stage).glob("events.out.tfevents*"))
        lines = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 8


def test_it_says_what_it_runs_and_where_to_look(demo):
    out, said = demo
    assert said.count("$ imagegpt-jax ") == 6
    assert str(out / "samples" / "grid.png") in said
    assert "Done in" in said


def test_it_explains_what_is_no_better_than_its_control(demo):
    out, said = demo
    scores = json.loads((out / "metrics.json").read_text())
    bits, unigram = (scores[f"decoder/{name}_image_bits_per_token"] for name in ("val", "unigram"))
    assert bits > unigram  # of 8 steps
    top1, shuffled = scores["generation/retrieval_top1"], scores["generation/retrieval_top1_shuffled"]
    text = " ".join(said.split())
    assert "No better than its control: The decoder predicts codes no better than the unigram control" in text
    assert ("No better than its control: The samples show their prompts no better" in text) == (top1 <= shuffled)
