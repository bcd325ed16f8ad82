"""Captions and prompts of published protocols, in their authors' formats."""

import json

import numpy as np
import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import prompts


def test_captions_of_coco_are_drawn_without_replacement(tmp_path):
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(10)]
    notes = [{"id": 100 + i, "image_id": i // 5, "caption": f" caption {i}\n"} for i in range(50)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": notes[::-1]}))
    drawn = prompts.coco_captions(tmp_path / "c.json", 30)
    assert len({row["id"] for row in drawn}) == 30
    for row in drawn:
        number = row["id"] - 100
        assert (row["text"], row["file_name"]) == (f"caption {number}", f"COCO_val2014_{number // 5:012d}.jpg")
    assert drawn == prompts.coco_captions(tmp_path / "c.json", 30)
    assert drawn != prompts.coco_captions(tmp_path / "c.json", 30, seed=1)
    with pytest.raises(UserError, match="has 50 captions, and 30000"):
        prompts.coco_captions(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(UserError, match="not COCO's"):
        prompts.coco_captions(tmp_path / "c.json")


def test_parti_prompts(tmp_path):
    (tmp_path / "p.tsv").write_text('Prompt\tCategory\tChallenge\na "bond"\tAbstract\tBasic\nb\tWorld\tQuantity\n')
    assert prompts.listed(tmp_path / "p.tsv")[0] == {
        "text": 'a "bond"',
        "category": "Abstract",
        "challenge": "Basic",
    }
    (tmp_path / "p.tsv").write_text("x\ty\n1\t2\n")
    with pytest.raises(UserError, match="no column Prompt"):
        prompts.listed(tmp_path / "p.tsv")


def red(image, row):
    """A judge for the test: whether the picture is red exactly if it should be."""
    return (image[..., 0].mean() > 128) == (row["include"][0]["class"] == "apple")


def test_geneval(tmp_path):
    rows = [
        {"tag": "single_object", "include": [{"class": "apple", "count": 1}], "prompt": "an apple"},
        {"tag": "single_object", "include": [{"class": "sky", "count": 1}], "prompt": "a sky"},
        {"tag": "counting", "include": [{"class": "apple", "count": 2}], "prompt": "two apples"},
    ]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = prompts.geneval(tmp_path / "g.jsonl")
    assert [row["prompt"] for row in rows] == ["an apple", "a sky", "two apples"]
    levels = [200, 10, 10, 10, 200, 200]  # two images of each
    right = [red(np.full((4, 4, 3), level, np.uint8), rows[i // 2]) for i, level in enumerate(levels)]
    score, shares = prompts.geneval_score(right, rows)
    assert shares == {"counting": 1.0, "single_object": 0.75}
    assert score == 0.875
    with pytest.raises(UserError, match="4 images do not divide among 3 prompts"):
        prompts.geneval_score(right[:4], rows)
    (tmp_path / "g.jsonl").write_text('{"tag": "x"}\n')
    with pytest.raises(UserError, match="line 1 of"):
        prompts.geneval(tmp_path / "g.jsonl")
