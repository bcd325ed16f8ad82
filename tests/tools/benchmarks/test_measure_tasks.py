import json

import numpy as np
import pytest


@pytest.fixture
def tool(load_tool):
    return load_tool("benchmarks/measure_tasks.py")


def test_ranks_and_distances(tool):
    scores = np.array([[3.0, 1, 2], [3, 1, 2], [0, 5, 9]])
    assert tool.ranks(scores, np.arange(3)) == {"first": 2 / 3, "among_five": 1.0, "median_rank": 1.0}
    assert tool.ranks(scores, np.array([1, 2, 0]))["median_rank"] == 3
    out, target, source = np.array([[0.0], [0], [0]]), np.array([[1.0], [-1], [3]]), np.array([[2.0], [-0.5], [4]])
    assert tool.nearer(out, target, source) == 2 / 3
    grey = np.full((1, 32, 32, 3), 7, np.uint8)
    assert not tool.thumbnails(grey).any()


def test_figures_come_with_their_controls(workdirs, tmp_path, load_tool):
    page = tmp_path / "page.md"
    page.write_text("<!-- tasks -->\n<!-- /tasks -->\n")
    flags = [f"--decoder={workdirs.decoder}", "--examples=3", "--split=validation"]
    load_tool("benchmarks/measure_tasks.py", *flags, f"--output={tmp_path / 'tasks.json'}", f"--page={page}").main()
    ((name, figures),) = json.loads((tmp_path / "tasks.json").read_text()).items()
    assert name.startswith("emoji:validation")
    rows = [line.split("|")[1:-1] for line in page.read_text().splitlines()[1:-1]]
    assert {len(cells) for cells in rows} == {3}
    assert rows[0][1].strip() == "emoji:validation"
    assert f"{figures['styles']['nearer_to_the_other_style']:.0%}" in next(r for r in rows if "other style" in r[0])[1]
    assert figures["inpainting"]["pixels_changed_outside"] == 0
    assert figures["inpainting"]["rms_error_inside"] > 0
    assert figures["captions"]["candidates"] == figures["styles"]["pairs"] == 3
    assert 0 <= figures["captions"]["image"]["first"] <= 1
    bits = figures["weights"]
    assert bits["float32_bits_per_code"] == pytest.approx(bits["int8_bits_per_code"], rel=0.05)
    assert bits["float32_bits_per_code"] != bits["int8_bits_per_code"]
    assert 1 < figures["steps"]["greedy_steps"] <= figures["steps"]["codes"] == 16
    for name in ("nearer_to_the_other_style", "control_reconstruction", "control_shuffled_prompts"):
        assert 0 <= figures["styles"][name] <= 1
