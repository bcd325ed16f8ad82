"""Scoring image sets from flags to JSON and page, with a network that costs nothing: colours of nine fields."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imagegpt_jax import images as images_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import networks
from imagegpt_jax.metrics.features import Network


def colours(params, images):
    B, H, W, C = images.shape
    fields = images.astype(jnp.float32).reshape(B, 3, H // 3, 3, W // 3, C).mean(axis=(2, 4)).reshape(B, -1)
    return {"pool": fields / 64 * params, "spatial": fields[:, :5] / 64, "logits": fields[:, :7] / 16 * params}


@pytest.fixture(autouse=True)
def network(monkeypatch):
    def load(path, resize):
        return Network("inception", {"path": path, "sha256": f"hash of {path}"}, np.asarray, colours, np.float32(1))

    monkeypatch.setattr(networks, "LOADERS", {"inception": load})


def folder(path, count, seed, pale=0, metadata=None):
    path.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        picture = rng.integers(pale, 256, (18, 18, 3)).astype(np.uint8)
        (path / f"{i:03d}.png").write_bytes(images_lib.png_bytes(picture, metadata or {}))
    return path


@pytest.fixture
def given(tmp_path):
    return folder(tmp_path / "images", 30, 0), folder(tmp_path / "reference", 26, 1, pale=40)


@pytest.fixture
def evaluate(binary, tmp_path):
    def run(*flags):
        binary("evaluate", *flags, f"--output={tmp_path / 'scores.json'}").main()
        return json.loads((tmp_path / "scores.json").read_text())

    return run


def pixels(path):
    return np.stack([np.asarray(Image.open(file)) for file in sorted(path.iterdir())])


def test_adms_reference_has_statistics_for_fid_and_images_for_the_rest(evaluate, given, tmp_path):
    images, reference = given
    metrics = "--metrics=fid,sfid,is,precision,recall"
    expected = evaluate(f"--images={images}", f"--reference={reference}", metrics, "--protocol=adm_imagenet256")
    features = {name: np.asarray(value, float) for name, value in colours(1.0, jnp.asarray(pixels(reference))).items()}
    arrays = {"mu": features["pool"].mean(0), "sigma": np.cov(features["pool"], rowvar=False)}
    arrays |= {"mu_s": features["spatial"].mean(0), "sigma_s": np.cov(features["spatial"], rowvar=False)}
    np.savez(tmp_path / "adm.npz", arr_0=pixels(reference), **arrays)
    scores = evaluate(
        f"--images={images}", f"--reference={tmp_path / 'adm.npz'}", metrics, "--protocol=adm_imagenet256"
    )
    for name in ("fid", "sfid"):
        assert scores[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-4)
    for name in ("is", "precision", "recall"):
        assert scores[name]["value"] == expected[name]["value"]
    about = scores["provenance"]["reference"]
    assert about["images"]["n"] == 26
    assert about["images"]["sha256"] == expected["provenance"]["reference"]["sha256"]


def test_batch_sizes_change_no_bit(evaluate, given):
    each_size = []
    for size in (1, 7, 64):
        scores = evaluate(*(f"--images={given[0]}", f"--reference={given[1]}", f"--batch_size={size}"))
        each_size.append({name: score for name, score in scores.items() if name != "provenance"})
    assert each_size[0] == each_size[1] == each_size[2]
    assert each_size[0].keys() == {"fid", "is", "kid"}


def test_what_drew_the_images_is_read_from_them(evaluate, given, tmp_path):
    about = {"prompt": "x", "seed": 5, "sampler": {"cfg_scale": 3.0}, "decoder": "runs/d", "step": 7, "index": 1}
    drawn = folder(tmp_path / "drawn", 12, 3, metadata=about)
    (drawn / "grid.png").write_bytes(images_lib.png_bytes(np.zeros((90, 90, 3), np.uint8), {}))
    page = tmp_path / "page.html"
    flags = (f"--images={drawn}", f"--reference={given[1]}", "--metrics=fid,kid", f"--report={page}")
    scores = evaluate(*flags, f"--train_images={given[0]}")
    provenance = scores["provenance"]
    assert (provenance["sampler"], provenance["sampling_seed"]) == ({"cfg_scale": 3.0}, 5)
    assert provenance["model"] == {"decoder": "runs/d", "step": 7}
    assert provenance["images"]["n"] == 12  # the overview beside the samples is none of them
    (tmp_path / "old.json").write_text(json.dumps(scores))
    evaluate(*flags, f"--sweep={tmp_path / 'old.json'},{tmp_path / 'old.json'}")
    text = page.read_text()
    for words in ("kid against guidance", "hash of", "few_samples", "<figcaption>x</figcaption>"):
        assert words in text
    with pytest.raises(UserError, match="no file /no/such.json"):
        evaluate(*flags, "--sweep=/no/such.json")


def test_intervals_and_extrapolation(evaluate, given):
    scores = evaluate(
        *(f"--images={given[0]}", f"--reference={given[1]}", "--metrics=fid,is"), "--bootstrap=20", "--infinity"
    )
    low, high = scores["fid"]["interval"]
    assert low < scores["fid"]["value"] < high
    assert scores["fid"]["interval_of"] == "bootstrap of 20, 95%"
    assert scores["fid"]["infinity"]["value"] < scores["fid"]["value"]
    assert scores["fid"]["infinity"]["points"][-1] == [30, pytest.approx(scores["fid"]["value"])]


def test_statistics_of_other_weights_are_refused(evaluate, given, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"")
    (tmp_path / "b.pth").write_bytes(b"")
    statistics = tmp_path / "reference.npz"
    flags = ("--metrics=is", f"--statistics_output={statistics}")
    evaluate(f"--images={given[1]}", f"--feature_weights={tmp_path / 'a.pth'}", *flags)
    flags = (f"--images={given[0]}", f"--reference={statistics}", "--metrics=fid")
    assert evaluate(*flags, f"--feature_weights={tmp_path / 'a.pth'}")["fid"]["n_reference"] == 26
    with pytest.raises(UserError, match=r"made with other weights of inception \(hash of .*a.pth\)"):
        evaluate(*flags, f"--feature_weights={tmp_path / 'b.pth'}")


def test_jpeg_files_and_traces_of_them_are_named(evaluate, given, tmp_path):
    for name, kind in (("lossy", "jpg"), ("resaved", "png")):
        (tmp_path / name).mkdir()
        for i in range(4):
            y, x = np.mgrid[:48, :48]
            picture = np.stack([128 + 60 * np.sin(x / (3 + i) + c) * np.cos(y / 4) for c in range(3)], -1)
            picture += np.random.default_rng(i).normal(0, 4, picture.shape)
            path = tmp_path / f"{i}.jpg"
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=80)
            Image.open(path).save(tmp_path / name / f"{i}.{kind}", quality=80)
    for name, warning in (("lossy", "lossy_format"), ("resaved", "jpeg_artefacts")):
        scores = evaluate(f"--images={tmp_path / name}", "--metrics=is", "--is_splits=2")
        assert [w["name"] for w in scores["provenance"]["warnings"]] == [warning]


def test_a_damaged_image_ends_it_with_one_sentence(evaluate, given):
    damaged = sorted(given[0].iterdir())[17]
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(UserError, match=r"017.png is damaged \(.*\): remove or replace it, and score again.$"):
        evaluate(f"--images={given[0]}", "--metrics=is")


def test_geneval_asks_a_scorer(evaluate, given, tmp_path, monkeypatch):
    rows = [{"tag": "colors", "include": [], "prompt": "dark"}, {"tag": "counting", "include": [], "prompt": "pale"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_judge.py").write_text("def judge(image, row):\n    return row['tag'] == 'colors'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = (f"--images={given[0]}", "--protocol=geneval", f"--captions={tmp_path / 'rows.jsonl'}")
    scores = evaluate(*flags, "--scorer=my_judge:judge")
    assert (scores["geneval"]["value"], scores["geneval"]["n"]) == (0.5, 30)
    assert scores["geneval"]["tags"] == {"colors": 1.0, "counting": 0.0}
    with pytest.raises(UserError, match="geneval needs --captions"):
        evaluate(f"--images={given[0]}", "--protocol=geneval")
    with pytest.raises(UserError, match="cannot be imported"):
        evaluate(*flags, "--scorer=my_judge:nothing")
