"""The comparison of quantizers: scores against their definitions, and what may stand in one table."""

import pathlib
import types

import numpy as np
import pytest
from absl import flags

from imagegpt_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def tool(load_tool):
    return load_tool("benchmarks/compare_quantizers.py")


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


class Halving:
    """A tokenizer that loses the least significant bit of every pixel, and uses three of its four codes."""

    num_codes = 4

    def encode(self, real):
        self.real = real
        return np.arange(2 * len(real)).reshape(len(real), 2) % 3

    def decode(self, codes):
        return (self.real // 2 * 2).astype(np.float32) / 127.5 - 1


def test_scores_are_their_definitions(tool):
    real = images(12)
    scores = tool.score(Halving(), real)
    mse = np.square(real % 2).mean((1, 2, 3))
    assert scores["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / mse)), rel=1e-6)
    assert scores["codebook_usage"] == 0.75
    assert scores["code_entropy_bits"] == pytest.approx(np.log2(3))
    assert (scores["images"], scores["total_codes"]) == (12, 24)
    fake, features = tool.thumbnails(real // 2 * 2), tool.thumbnails(real)
    unlike = ~np.eye(12, dtype=bool)
    pairs = [(fake, fake), (features, features), (fake, features)]
    a, b, across = (((x @ y.T / 768 + 1) ** 3)[unlike].mean() for x, y in pairs)  # none with its own original
    assert scores["kid"] == pytest.approx(a + b - 2 * across)


def test_features_are_pictures_of_16_pixels(tool):
    real = images(3)
    features = tool.thumbnails(real)
    assert features.shape == (3, 768)
    expected = real[1, :2, :2].astype(np.float64).mean((0, 1)) / 127.5 - 1
    np.testing.assert_allclose(features[1, :3], expected)


def test_controls_tell_alike_from_unlike(tool):
    """Halves of one set are near each other; pictures without any detail are far."""
    base = 255 * np.random.default_rng(1).integers(0, 2, (2000, 2, 1, 3)).astype(np.uint8)
    real = np.kron(base, np.ones((1, 16, 32, 1), np.uint8))
    controls = tool.controls(real[:400], 64 * 400, 512)
    assert controls["mean_color_kid"] > 0.15
    assert abs(controls["halves_kid"]) < 0.1 * controls["halves_kid_std"] ** 0.5 < controls["mean_color_kid"]
    flat = real[:400].mean((1, 2), keepdims=True).astype(np.uint8)
    assert controls["mean_color_psnr"] == pytest.approx(tool.psnr(flat, real[:400]), abs=0.1)
    assert controls["random_usage"] == 1.0
    assert 8.9 < controls["random_entropy_bits"] < 9.0


def report(name, **changes):
    controls = {"halves_kid": 0.001, "halves_kid_std": 0.004, "mean_color_kid": 0.3, "mean_color_psnr": 9.5,
                "random_usage": 1.0, "random_entropy_bits": 8.98}  # fmt: skip
    return {
        "name": name, "steps": 60, "size": "emoji", "images": 258, "bits": 9.0, "parameters": 1000, "psnr": 20.0,
        "codes": "1 of 512", "kid": 0.0012, "codebook_usage": 0.5, "code_entropy_bits": 7.0, "step_seconds": 0.5,
        "controls": controls, "device": "cpu", **changes,
    }  # fmt: skip


def test_page_ranks_and_states_the_steps(tool):
    text = tool.page([report("vq"), report("fsq", psnr=21.5, parameters=1009)])
    assert text.index("| FSQ | 1 of 512 | 1,009 | 21.50 | 1.20 | 50% | 7.00 | 0.50 |") < text.index("| VQ, on the unit")
    assert "**60 steps**" in text
    assert "| | 1.00 +- 4.00 | | |" in text
    assert "mean colour | 9.50 | 300.00 | | |" in text
    assert "drawn at random | | | 100% | 8.98 |" in text


@pytest.mark.parametrize("change", [{"steps": 61}, {"images": 5}, {"bits": 8.0}, {"parameters": 1011}])
def test_what_is_not_equal_is_not_compared(tool, change):
    with pytest.raises(UserError, match="differ in|over 1% apart"):
        tool.page([report("vq"), report("fsq", **change)])


def test_step_time_leaves_the_compiling_interval_out(tool, tmp_path):
    lines = [0.1, 40.0, 64.0, 32.0]
    text = "".join(f'{{"step": {i}, "timing/examples_per_second": {x}}}\n' for i, x in enumerate(lines))
    (tmp_path / "timing.jsonl").write_text(text)
    assert tool.step_seconds(tmp_path, 32) == 0.5


def test_training_is_asked_for_by_name(tool, monkeypatch, tmp_path):
    seen = []
    done = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(tool.subprocess, "run", lambda command, **_: seen.append(command) or done)
    flags.FLAGS(["x", "--steps=7"])
    tool.train("bsq", tmp_path)
    assert "--config=configs/tokenizer.py:size=emoji,quantizer=bsq" in seen[0]
    assert "--config.steps=7" in seen[0]
    done.returncode = 1
    with pytest.raises(UserError, match="training bsq failed"):
        tool.train("bsq", tmp_path)


def test_names_are_those_of_the_config(tool):
    from imagegpt_jax.config import sibling

    assert set(tool.NAMES) == set(sibling(str(ROOT / "configs" / "x.py"), "tokenizer.py").QUANTIZER_KINDS)


def test_page_waits_until_all_are_scored(tool, monkeypatch, tmp_path, capsys):
    """One call for each quantizer, and whichever is last writes the page."""
    monkeypatch.setattr(tool, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(tool, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(tool, "NAMES", {"vq": "VQ", "fsq": "FSQ"})
    monkeypatch.setattr(tool, "compare", lambda name: report(name, steps=7))
    arguments = ["x", "--steps=7", f"--workdir={tmp_path}"]
    (tmp_path / "emoji-7").mkdir()
    flags.FLAGS([*arguments, "--quantizers=fsq"])
    tool.main()
    assert "No page yet: vq not scored at 7 steps" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.*"))
    flags.FLAGS([*arguments, "--quantizers="])
    tool.main()
    assert "[1/1] vq" in capsys.readouterr().err  # what is scored is not trained again
    text = tool.PAGE.read_text()
    assert "| VQ |" in text
    assert "| FSQ |" in text
    tool.PAGE.unlink()
    flags.FLAGS([*arguments, "--render"])
    tool.main()
    assert tool.PAGE.read_text() == text
