"""From a checkpoint and a file of prompts to a file of scores, with networks that cost nothing."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imagegpt_jax import images as images_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.evaluation import generate_for_prompts
from imagegpt_jax.generation import pipeline
from imagegpt_jax.metrics import networks
from imagegpt_jax.metrics.features import Network


def colours(params, images):
    means = images.astype(jnp.float32).mean(axis=(1, 2)) / 64 * params
    return {"pool": means, "embedding": means, "logits": means}


def words(path, texts):
    """Directions that tell texts apart."""
    return np.array([[len(text), text.count("e") + 1, text.startswith("A photo depicts ")] for text in texts], float)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    def loader(name):
        return lambda path, resize: Network(name, {"path": path, "sha256": "0"}, np.asarray, colours, np.float32(1))

    monkeypatch.setattr(networks, "LOADERS", {name: loader(name) for name in ("clip", "efficientnet_lite0")})
    monkeypatch.setattr(networks, "embed_texts", words)


@pytest.fixture
def evaluate(binary, tmp_path):
    (tmp_path / "clip").mkdir(exist_ok=True)

    def run(*flags, output="scores.json"):
        binary(
            "evaluate", f"--feature_weights=clip={tmp_path / 'clip'}", *flags, f"--output={tmp_path / output}"
        ).main()
        return json.loads((tmp_path / output).read_text())

    return run


@pytest.fixture
def parti(tmp_path):
    rows = "".join(f'noto emoji of "thing" {i}\tWorld\tBasic\n' for i in range(5))
    (tmp_path / "parti.tsv").write_text(f"Prompt\tCategory\tChallenge\n{rows}")
    return tmp_path / "parti.tsv"


def test_parti_prompts_are_drawn_and_scored(evaluate, workdirs, parti, tmp_path, monkeypatch):
    flags = (f"--checkpoint={workdirs.decoder}", f"--prompts={parti}", "--protocol=parti_prompts", "--seed=3")
    scores = evaluate(*flags, "--sampler=cfg_scale=1.5,top_k=9", f"--report={tmp_path / 'page.html'}")
    assert (scores["clip_score"]["n"], scores["provenance"]["protocol"]["name"]) == (5, "parti_prompts")
    about = scores["provenance"]
    assert (about["sampler"]["cfg_scale"], about["sampler"]["top_k"], about["sampling_seed"]) == (1.5, 9, 3)
    assert (about["model"]["decoder"], about["model"]["step"]) == (str(workdirs.decoder), 2)
    assert [w["name"] for w in about["warnings"]] == ["wrong_count"]
    assert "noto emoji of &quot;thing&quot; 4" in (tmp_path / "page.html").read_text()

    folder = tmp_path / "scores_samples"
    files = sorted(folder.glob("*.png"))
    kept = [file.read_bytes() for file in files]
    metadata = images_lib.read_metadata(kept[4])
    assert (metadata["prompt"], metadata["index"], metadata["sampler"]["top_k"]) == ('noto emoji of "thing" 4', 4, 9)
    # CLIPScore from its definition.
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]).astype(float)
    colours, texts = pixels.mean(axis=(1, 2)), words("", [f'noto emoji of "thing" {i}' for i in range(5)])
    cosines = (colours * texts).sum(1) / np.linalg.norm(colours, axis=1) / np.linalg.norm(texts, axis=1)
    assert scores["clip_score"]["value"] == pytest.approx(100 * cosines.mean(), rel=1e-5)

    # Cut short: what is missing is drawn again, to the same bytes; another request is refused.
    files[2].unlink()
    assert evaluate(*flags, "--sampler=cfg_scale=1.5,top_k=9")["clip_score"] == scores["clip_score"]
    assert [file.read_bytes() for file in sorted(folder.glob("*.png"))] == kept
    monkeypatch.setattr(pipeline.Pipeline, "prepare", None)
    evaluate(*flags, "--sampler=cfg_scale=1.5,top_k=9")
    with pytest.raises(UserError, match=r"scores_samples holds other pictures \(sampler\): give another --samples_dir"):
        evaluate(*flags, "--sampler=cfg_scale=2,top_k=9")


def test_captions_of_coco_against_photographs_of_any_size(evaluate, workdirs, tmp_path):
    notes = [{"id": i, "image_id": 1, "caption": f"noto emoji, number {i}"} for i in range(9)]
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": notes}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(coco))
    (tmp_path / "coco_captions.csv").write_text("Prompt\n" + "\n".join(note["caption"] for note in notes))
    (tmp_path / "val").mkdir()
    for i, (height, width) in enumerate([(300, 280), (260, 400), (257, 257), (300, 300)]):
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(noise).convert("L" if i == 2 else "RGB").save(tmp_path / "val" / f"{i}.jpg")
    flags = (f"--checkpoint={workdirs.decoder}", "--protocol=coco30k_zero_shot", f"--reference={tmp_path / 'val'}")
    flags += ("--metrics=clip_score,cmmd", "--num_images=4")
    drawn = evaluate(*flags, f"--prompts={tmp_path / 'captions_val2014.json'}")
    listed = evaluate(*flags, f"--prompts={tmp_path / 'coco_captions.csv'}", output="csv.json")
    rows = [
        json.loads(line)
        for line in (tmp_path / "scores_samples" / generate_for_prompts.CAPTIONS).read_text().splitlines()
    ]
    in_order = [
        json.loads(line) for line in (tmp_path / "csv_samples" / generate_for_prompts.CAPTIONS).read_text().splitlines()
    ]
    assert [row["text"] for row in in_order] == [note["caption"] for note in notes[:4]]
    assert len({row["id"] for row in rows}) == 4
    assert {row["text"] for row in rows} != {row["text"] for row in in_order}
    for scores in (drawn, listed):
        about = scores["provenance"]["reference"]
        assert (about["n"], about["height"], about["width"], about["formats"]) == (4, 256, 256, {"JPEG": 4})
        assert scores["clip_score"]["n"] == 4


def test_geneval_judges_four_pictures_of_each_prompt(evaluate, workdirs, tmp_path, monkeypatch):
    tags = ("single_object", "counting", "counting")
    rows = [{"tag": tag, "include": [], "prompt": f"noto emoji {i}"} for i, tag in enumerate(tags)]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prompted_judge.py").write_text("def judge(image, row):\n    return row['prompt'] == 'noto emoji 1'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = (f"--checkpoint={workdirs.decoder}", f"--prompts={tmp_path / 'g.jsonl'}", "--protocol=geneval")
    scores = evaluate(*flags, "--scorer=prompted_judge:judge")
    assert (scores["geneval"]["n"], scores["geneval"]["value"]) == (12, 0.25)
    assert scores["geneval"]["tags"] == {"counting": 0.5, "single_object": 0.0}


def test_classes_without_a_file(evaluate, workdirs, tmp_path):
    flags = (f"--checkpoint={workdirs.classes}", f"--prompts={generate_for_prompts.CLASSES}", "--protocol=emoji")
    (tmp_path / "reference").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "reference" / f"{i}.png")
    scores = evaluate(*flags, f"--reference={tmp_path / 'reference'}", "--samples_per_prompt=2", "--num_images=5")
    assert scores["kid"]["n"] == 5
    rows = [
        json.loads(line)
        for line in (tmp_path / "scores_samples" / generate_for_prompts.CAPTIONS).read_text().splitlines()
    ]
    count = len(json.loads((workdirs.classes / "labels.json").read_text()))
    assert [row["class"] for row in rows] == [i % count for i in range(5)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--images={decoder}"], "drawn by a decoder: give --checkpoint"),
        (["--checkpoint={tokenizer}"], "one decoder"),
        (["--checkpoint={decoder}", "--checkpoint={tokenizer}"], "one decoder"),
        (["--checkpoint={decoder}", "--prompts=/no/such.tsv"], "no file /no/such.tsv"),
        (["--checkpoint={decoder}", "--sampler=cfg_scal=2"], "Did you mean 'cfg_scale'"),
        (["--checkpoint={decoder}", "--sampler=cfg_scale=much"], "write cfg_scale=1.0"),
        (["--checkpoint={decoder}", "--sampler=top_p=3"], "top_p=3.0 must be"),
        (["--checkpoint={decoder}", "--metrics=fid"], "fid needs --reference"),
        (["--checkpoint={decoder}", "--protocol=geneval", "--scorer=json:loads"], "line 1: not JSON"),
    ],
)
def test_mistakes_are_told_before_any_work(evaluate, workdirs, parti, monkeypatch, flags, words):
    monkeypatch.setattr(generate_for_prompts, "draw", None)
    base = [f"--prompts={parti}", "--protocol=parti_prompts"]
    with pytest.raises(UserError, match=words):
        evaluate(*base, *(flag.format(**vars(workdirs)) for flag in flags))


def test_other_files_in_the_folder_are_left_alone(evaluate, workdirs, parti, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("x")
    flags = (f"--checkpoint={workdirs.decoder}", f"--prompts={parti}", "--protocol=parti_prompts")
    with pytest.raises(UserError, match="mine holds other pictures"):
        evaluate(*flags, f"--samples_dir={tmp_path / 'mine'}")
