"""Scoring folders and arrays of images, with the FID Inception at random weights."""

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import protocols, provenance

ROOT = pathlib.Path(__file__).resolve().parents[1]
METRICS = ("fid", "sfid", "is", "kid", "precision", "recall", "density", "coverage")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """`images`, `reference`: folders of 9 and 6 pictures; `weights`: a file."""
    root = tmp_path_factory.mktemp("given")
    spec = importlib.util.spec_from_file_location(
        "reference_programs", ROOT / "tools" / "golden" / "reference_programs.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    safetensors.numpy.save_file(tool.random_inception(0), root / "inception.safetensors")
    rng = np.random.default_rng(0)
    for name, count, pale in (("images", 9, 0), ("reference", 6, 80)):
        (root / name).mkdir()
        for i in range(count):
            coarse = rng.integers(pale, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(root / name / f"{i:02d}.png")
    return types.SimpleNamespace(
        images=root / "images", reference=root / "reference", weights=root / "inception.safetensors"
    )


def flags(given, *more, metrics=METRICS):
    return [
        f"--images={given.images}",
        f"--reference={given.reference}",
        f"--feature_weights={given.weights}",
        f"--metrics={','.join(metrics)}",
        *more,
    ]


@pytest.fixture(scope="module")
def first(given, tmp_path_factory):
    """The scores of one process, and the statistics that it wrote of the reference."""
    out = tmp_path_factory.mktemp("first")
    scores = out / "scores.json"
    command = [sys.executable, "-m", "imagegpt_jax.evaluate", *flags(given, "--batch_size=64"), f"--output={scores}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return types.SimpleNamespace(scores=json.loads(scores.read_text()), printed=ran.stdout, path=scores)


@pytest.fixture
def evaluate(binary, tmp_path):
    def run(*flags):
        output = tmp_path / "scores.json"
        binary("evaluate", *flags, f"--output={output}").main()
        return json.loads(output.read_text())

    return run


def values(scores):
    return {name: score["value"] for name, score in scores.items() if name != "provenance"}


def test_scores_say_what_was_measured(given, first):
    scores = first.scores
    assert list(scores) == [*METRICS, "provenance"]
    for name in METRICS:
        assert scores[name]["n"] == 9
        assert np.isfinite(scores[name]["value"])
    assert scores["fid"]["n_reference"] == 6
    assert scores["fid"]["value"] > 0
    assert 1 <= scores["is"]["value"] <= 1008
    low, high = scores["kid"]["interval"]
    assert low <= scores["kid"]["value"] <= high
    assert (scores["kid"]["subset_size"], scores["kid"]["interval_of"]) == (6, "subsets of 6, 95%")
    about = scores["provenance"]
    assert about["protocol"] == json.loads(json.dumps(protocols.find("torch_fidelity").facts()))
    assert (about["images"]["n"], about["images"]["height"], about["images"]["formats"]) == (9, 32, {"PNG": 9})
    assert about["reference"]["sha256"] != about["images"]["sha256"]
    assert about["feature_weights"]["inception"]["path"] == str(given.weights)
    assert len(about["feature_weights"]["inception"]["sha256"]) == len(about["code_sha256"]) == 64
    assert about["seconds"] > 0
    assert [warning["name"] for warning in about["warnings"]] == ["few_samples", "small_splits"]
    assert "warning (few_samples)" in first.printed
    assert f"{scores['fid']['value']:.6g}" in first.printed


def test_batch_sizes_give_the_same_numbers(evaluate, given, first):
    """1 here, 64 in the first run; 7 and more in tests/evaluation/test_image_sets.py."""
    scores = evaluate(*flags(given, "--batch_size=1"))
    for name, value in values(scores).items():
        assert value == pytest.approx(values(first.scores)[name], rel=1e-9), name


def test_two_processes_give_the_same_numbers(given, first, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(2):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-m", "imagegpt_jax.evaluate", *flags(given), f"--output={tmp_path / 'two.json'}"]
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        texts = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(texts)
    scores = json.loads((tmp_path / "two.json").read_text())
    assert scores["provenance"]["processes"] == 2
    for name, value in values(scores).items():
        assert value == pytest.approx(values(first.scores)[name], rel=1e-9), name
    for name in ("images", "reference"):
        assert scores["provenance"][name]["sha256"] == first.scores["provenance"][name]["sha256"]


def test_arrays_and_statistics_score_like_the_folders_they_were_made_from(evaluate, given, first, tmp_path):
    files = sorted(given.images.iterdir())
    np.savez(tmp_path / "images.npz", arr_0=np.stack([np.asarray(Image.open(file)) for file in files]))
    made = f"--statistics_output={tmp_path / 'reference.npz'}"
    weights = f"--feature_weights={given.weights}"
    evaluate(f"--images={given.reference}", "--metrics=is", weights, made)
    both = (f"--images={tmp_path / 'images.npz'}", f"--reference={tmp_path / 'reference.npz'}", weights)
    scores = evaluate(*both, "--metrics=fid,sfid,is", "--bootstrap=3")
    for name, value in values(scores).items():
        assert value == pytest.approx(values(first.scores)[name], rel=1e-9), name
    low, high = scores["fid"]["interval"]
    assert low < scores["fid"]["value"] < high
    assert scores["provenance"]["images"]["sha256"] == first.scores["provenance"]["images"]["sha256"]
    reference = scores["provenance"]["reference"]
    assert (reference["n"], reference["protocol"]) == (6, "torch_fidelity")
    assert reference["images_sha256"] == first.scores["provenance"]["reference"]["sha256"]
    with pytest.raises(UserError, match="KID, precision, recall and the like need reference images"):
        evaluate(*both, "--metrics=kid")
    with pytest.raises(UserError, match="by the protocol torch_fidelity, not clean_fid: .*resize"):
        evaluate(*both, "--metrics=fid", "--protocol=clean_fid")


def test_classic_mistakes_are_named(evaluate, given, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for i in range(3):
        Image.open(given.reference / f"{i:02d}.png").save(wrong / f"{i}.png")
    Image.open(given.reference / "00.png").save(wrong / "copy.png")
    scores = evaluate(
        f"--images={wrong}",
        f"--reference={given.reference}",
        f"--train_images={wrong}",
        f"--feature_weights={given.weights}",
        "--protocol=adm_imagenet256",
        "--metrics=fid",
    )
    names = [warning["name"] for warning in scores["provenance"]["warnings"]]
    assert sorted(set(names)) == sorted(
        ["wrong_size", "duplicates", "train_images", "few_samples", "wrong_count", "overlap"]
    )
    text = next(w["text"] for w in scores["provenance"]["warnings"] if w["name"] == "train_images")
    assert text.startswith("3 of 6 reference images were trained on")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--metrics=fid,kdi"], "unknown metric 'kdi'. Did you mean 'kid'"),
        (["--metrics=fid,fid"], "each metric once"),
        (["--images=/no/such"], "there is no folder or file /no/such"),
        (["--reference="], "fid needs --reference"),
        (["--feature_weights=/no/such.pth"], "twice|no feature weights at /no/such.pth"),
        (["--feature_weights=incepton=/no/such.pth"], "unknown network. Did you mean 'inception'"),
    ],
)
def test_mistakes_are_told_before_any_work(evaluate, given, monkeypatch, more, words):
    import jax

    monkeypatch.setattr(jax, "jit", None)
    with pytest.raises(UserError, match=words):
        evaluate(*flags(given, metrics=("fid",)), *more)


def test_missing_weights_without_network(evaluate, given, monkeypatch, tmp_path):
    monkeypatch.setenv("IMAGEGPT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(UserError, match=r"not in .*cache.*could not be downloaded.*give it by --feature_weights"):
        evaluate(f"--images={given.images}", "--metrics=is")


def offline(*args, **kwargs):
    raise OSError("no route to host")


def test_weights_that_do_not_fit(evaluate, given, tmp_path):
    arrays = safetensors.numpy.load_file(given.weights)
    arrays["fc.weight"] = arrays["fc.weight"][:1000]
    arrays["AuxLogits.fc.bias"] = arrays.pop("fc.bias")
    safetensors.numpy.save_file(arrays, tmp_path / "torchvision.safetensors")
    with pytest.raises(
        UserError, match=r"fc.bias is missing; AuxLogits.fc.bias is unknown; fc.weight is \(1000, 2048\)"
    ):
        evaluate(
            f"--images={given.images}", "--metrics=is", f"--feature_weights={tmp_path / 'torchvision.safetensors'}"
        )


# ----------------------------------------------------------------------------------------------------------- comparing


def changed(first, tmp_path, **changes):
    scores = json.loads(json.dumps(first.scores))
    for path, value in changes.items():
        place = scores
        *parents, last = path.split("__")
        for key in parents:
            place = place[key]
        place[last] = value
    (tmp_path / "b.json").write_text(json.dumps(scores))
    return [str(first.path), str(tmp_path / "b.json")]


def test_comparison_explains_what_differs(first, tmp_path):
    paths = changed(
        first,
        tmp_path,
        fid__value=first.scores["fid"]["value"] + 1.5,
        kid__interval=[9.0, 10.0],
        provenance__reference__sha256="f" * 64,
        provenance__sampler={"cfg_scale": 3},
    )
    text = provenance.compare(paths)
    assert "+1.5" in text
    assert "intervals are apart" in text
    assert "reference.sha256" in text
    assert "other reference: the scores are not comparable" in text
    assert 'sampler: {} | {"cfg_scale": 3}' in text
    assert "another seed" not in text


def test_scores_of_two_protocols_are_not_compared(first, tmp_path):
    paths = changed(first, tmp_path, provenance__protocol=protocols.find("clean_fid").facts())
    with pytest.raises(UserError, match="torch_fidelity and clean_fid, which cannot be compared: .*resize: 'tf1_bil"):
        provenance.compare(paths)


def test_compare_from_the_command_line(first, tmp_path):
    command = [sys.executable, "-m", "imagegpt_jax.evaluate", "--compare", str(first.path), str(first.path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "no difference in what the scores were made of" in ran.stdout
    (tmp_path / "x.json").write_text("{}")
    command[-1] = str(tmp_path / "x.json")
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode != 0
    assert ran.stderr.startswith("error: ")
    assert "has no provenance" in ran.stderr
