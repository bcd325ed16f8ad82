"""The scoring binary on the workdirs of tiny networks."""

import json

import numpy as np
import pytest
from PIL import Image

from imagegpt_jax.errors import UserError
from imagegpt_jax.evaluation import checkpoint_data, score_table
from imagegpt_jax.inference import export
from imagegpt_jax.metrics import provenance
from imagegpt_jax.parallel import sharding
from imagegpt_jax.runtime import distributed

SMALL = ["--generation_prompts=6", "--samples_per_prompt=2"]


@pytest.fixture
def evaluate(binary, tmp_path):
    """Runs the binary and returns the scores that it wrote."""

    def run(*flags, output="out"):
        binary("evaluate", *flags, f"--output={tmp_path / output / 'metrics.json'}").main()
        return json.loads((tmp_path / output / "metrics.json").read_text())

    return run


def test_both_stages_in_one_flat_object(evaluate, workdirs, tmp_path, capsys):
    flags = [f"--checkpoint={workdirs.decoder}", f"--checkpoint={workdirs.tokenizer}", *SMALL]
    scores = evaluate(*flags, f"--images_dir={tmp_path / 'pictures'}", f"--report={tmp_path / 'page.html'}")
    page = (tmp_path / "page.html").read_text()
    for words in ("Generations", "Worst reconstructions", "Nearest training images"):
        assert f"<h2>{words}</h2>" in page
    assert all(isinstance(value, int | float | str) for value in scores.values())
    assert 0 < scores["tokenizer/codebook_usage"] <= 1
    assert 1 <= scores["tokenizer/codebook_perplexity"] <= 64
    assert 0 < scores["tokenizer/val_psnr"] < 100
    assert scores["tokenizer/val_psnr_mean_color"] > 0
    assert scores["decoder/val_image_tokens"] == 16 * scores["decoder/images"] == 16 * scores["tokenizer/images"]
    for kind in ("image", "text"):
        assert scores[f"decoder/val_{kind}_bits_per_token"] > scores[f"decoder/unigram_{kind}_bits_per_token"] > 0
    assert scores["decoder/unigram_image_bits_per_token"] <= 6
    per_token = scores["decoder/val_image_bits_per_token"]
    assert scores["decoder/val_image_bits_per_dim"] == pytest.approx(per_token * 16 / (16 * 16 * 3))
    assert 0 <= scores["generation/retrieval_top1"] <= 1
    assert 0 <= scores["generation/retrieval_top1_shuffled"] <= 1
    assert scores["generation/retrieval_chance"] == pytest.approx(1 / 6)
    # Provenance: what was scored, on what, how.
    assert scores["tokenizer/checkpoint"] == str(workdirs.tokenizer)
    assert scores["decoder/step"] == scores["tokenizer/step"] == 2
    assert scores["tokenizer/data"] == scores["generation/data"] == "emoji:validation,res=16,styles=noto"
    assert len(scores["decoder/data_fingerprint"]) >= 16
    assert len(scores["decoder/fingerprint"]) == 16
    assert scores["tokenizer/fingerprint"] == scores["decoder/tokenizer_fingerprint"]
    assert len(scores["code_sha256"]) == 64
    assert scores["seconds"] > 0
    assert (scores["generation/samples_per_prompt"], scores["generation/cfg_scale"]) == (2, 3.0)
    out = capsys.readouterr().out
    assert "prompts shuffled" in out
    assert "unigram" in out
    assert f"{scores['tokenizer/val_psnr']:.4f}" in out
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"reconstructions.png", "generations.png"}
    assert Image.open(tmp_path / "pictures" / "reconstructions.png").size == (16 * 16, 2 * 16)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json"}


def check_same(one, other, rel):
    """All scores and what they were made of, but for what tells a workdir from what was exported of it."""
    assert one.keys() == other.keys()
    for key in one:
        if not key.endswith(("seconds", "/step", "checkpoint")):
            assert other[key] == (pytest.approx(one[key], rel=rel) if isinstance(one[key], float) else one[key]), key


def test_scores_do_not_depend_on_batch_size(evaluate, workdirs):
    flags = [f"--checkpoint={workdirs.tokenizer}", "--data=emoji:validation,res=16,styles=twemoji"]
    one, *others = (evaluate(*flags, f"--batch_size={size}") for size in (7, 1, 64))
    assert one["tokenizer/data"] == "emoji:validation,res=16,styles=twemoji"
    for other in others:
        check_same(one, other, 1e-9)


def test_exported_folders_score_like_the_workdirs_they_were_exported_from(evaluate, workdirs, tmp_path):
    exported = [tmp_path / "x" / task for task in ("tokenizer", "decoder")]
    for path in exported:
        export.convert(getattr(workdirs, path.name), path)
    scores = evaluate(*(f"--checkpoint={path}" for path in exported), "--generation_prompts=0")
    assert (scores["tokenizer/checkpoint"], scores["decoder/step"]) == (str(exported[0]), 0)
    flags = [f"--checkpoint={workdirs.tokenizer}", f"--checkpoint={workdirs.decoder}", "--generation_prompts=0"]
    check_same(scores, evaluate(*flags), 1e-6)
    with pytest.raises(UserError, match="which have no steps"):
        evaluate(f"--checkpoint={exported[0]}", "--step=1")


def test_published_tokenizers_need_data_and_ops(evaluate, workdirs, tmp_path):
    export.convert(workdirs.tokenizer, tmp_path / "x")
    about = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps({**about, "run": {}}))
    flags = [f"--checkpoint={tmp_path / 'x'}", "--data=emoji:validation,res=16,styles=twemoji"]
    with pytest.raises(UserError, match="does not say on which data it is scored"):
        evaluate(*flags)
    scores = evaluate(*flags, "--ops=decode|value_range(-1,1)")
    assert scores["tokenizer/images"] > 10


def test_scores_of_checkpoints_are_compared(tmp_path):
    about = {"code_sha256": "0" * 64, "seconds": 9.0, "decoder/checkpoint": "runs/a", "samples/protocol": "emoji"}
    a = {**about, "samples/kid": 0.5, "decoder/images": 83}
    b = {**about, "samples/kid": 0.25, "decoder/images": 83, "decoder/checkpoint": "runs/b"}
    a["generation/together"] = b["generation/tokens_per_step"] = 4  # as it was called before, and today
    for name, scores in (("a", a), ("b", b), ("c", {**b, "samples/protocol": "clean_fid"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(scores))
    text = provenance.compare([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "-0.25" in text
    assert "decoder/checkpoint: runs/a | runs/b" in text
    assert "decoder/images" not in text
    assert "only in" not in text
    with pytest.raises(UserError, match="of emoji and clean_fid"):
        provenance.compare([str(tmp_path / "a.json"), str(tmp_path / "c.json")])


def test_checkpoints_of_classes_and_of_older_steps(evaluate, workdirs):
    scores = evaluate(f"--checkpoint={workdirs.classes}", "--step=1", *SMALL)
    assert scores["decoder/step"] == 1
    assert scores["generation/prompts"] == 6
    assert "decoder/val_text_bits_per_token" not in scores  # after a class alone there is nothing to predict
    assert not any(key.startswith("tokenizer/") for key in scores)


def test_reconstructions_score_like_image_sets_and_the_page_shows_them(evaluate, workdirs, tmp_path):
    flags = [f"--checkpoint={workdirs.tokenizer}", "--data=emoji:validation,res=16,styles=twemoji"]
    scores = evaluate(*flags, "--metrics=psnr,ssim", f"--report={tmp_path / 'page.html'}")
    # Pixels are rounded to 256 levels in both.
    assert scores["reconstruction/psnr"] == pytest.approx(scores["tokenizer/val_psnr"], rel=1e-4)
    assert -1 <= scores["reconstruction/ssim"] <= 1
    assert scores["reconstruction/images"] == scores["tokenizer/images"]
    page = (tmp_path / "page.html").read_text()
    for words in ("Codebook use", "Worst reconstructions", "reconstruction/ssim", "data:image/png;base64,"):
        assert words in page


def test_samples_score_like_image_sets(evaluate, workdirs, monkeypatch):
    """With features that cost nothing: colours."""
    from imagegpt_jax.metrics import networks
    from imagegpt_jax.metrics.features import Network

    network = Network("efficientnet_lite0", {"path": "x", "sha256": "0"}, np.asarray, colours, np.float32(1))
    monkeypatch.setattr(networks, "LOADERS", {"efficientnet_lite0": lambda path, resize: network})
    scores = evaluate(f"--checkpoint={workdirs.decoder}", "--protocol=emoji", "--metrics=kid", *SMALL)
    assert scores["samples/kid"] > scores["samples/kid_real"]  # a network of random numbers draws noise
    assert (scores["samples/images"], scores["samples/protocol"]) == (12, "emoji")
    assert scores["samples/reference_images"] == scores["decoder/images"]
    # Of many processes the first alone knows the scores.
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    with pytest.raises(FileNotFoundError):
        evaluate(f"--checkpoint={workdirs.decoder}", "--protocol=emoji", "--metrics=kid", *SMALL, output="other")


def colours(params, images):
    return {"pool": images.mean(axis=(1, 2)) / 64 * params}


def test_token_shards_score_like_the_images_they_were_made_from(evaluate, binary, workdirs, tmp_path):
    spec = "emoji:validation,res=16,styles=noto"
    binary("encode", f"--tokenizer={workdirs.tokenizer}", f"--data={spec}", f"--output={tmp_path / 't'}").main()
    flags = [f"--checkpoint={workdirs.decoder}", "--generation_prompts=0"]
    images, tokens = evaluate(*flags, f"--data={spec}"), evaluate(*flags, f"--data=tokens:{tmp_path / 't'}")
    for key in ("val_loss", "val_image_bits_per_token", "unigram_image_bits_per_token", "unigram_text_bits_per_token"):
        assert tokens[f"decoder/{key}"] == pytest.approx(images[f"decoder/{key}"], rel=1e-5)
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate(f"--checkpoint={workdirs.classes}", f"--data=tokens:{tmp_path / 't'}")
    assert checkpoint_data.source_of(f"tokens:{tmp_path / 't'}") == spec


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint={tokenizer}", "--checkpoint={tokenizer}"], "both a tokenizer"),
        (["--checkpoint={tokenizer}", "--checkpoint={decoder}", "--step=1"], "single --checkpoint"),
        (["--checkpoint={tokenizer}", "--step=9"], "step 9"),
        (["--checkpoint=/no/such/folder"], "/no/such/folder"),
        (["--checkpoint={tokenizer}", "--data=emoji:trian"], "Did you mean 'train'"),
        (["--checkpoint={decoder}", "--data=emoji:validation,res=16", "--generation_data=folder:/no/such"], "/no/such"),
    ],
)
def test_mistakes_are_found_before_any_work(evaluate, workdirs, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(sharding, "make_mesh", None)
    with pytest.raises(UserError, match=words):
        evaluate(*(flag.format(**vars(workdirs)) for flag in flags))
    assert list(tmp_path.iterdir()) == []


def test_output_must_be_a_file(binary, workdirs, tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        binary("evaluate", f"--checkpoint={workdirs.tokenizer}", f"--output={tmp_path}").main()


def test_table_leaves_out_what_was_not_scored():
    text = score_table.table({"generation/retrieval_top1": 0.25, "generation/retrieval_top1_shuffled": 0.01})
    assert text.split() == ["top-1", "retrieval", "0.2500", "prompts", "shuffled", "0.0100"]
    assert np.all(
        [
            key.split("/")[0] in ("tokenizer", "reconstruction", "decoder", "generation", "samples")
            for _, key, *_ in score_table.TABLE
        ]
    )
