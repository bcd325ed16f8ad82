"""Small published weights, kept in tests/golden/weights with what their references compute: no PyTorch is needed.

`tools/golden/make_golden_weights.py` makes them.
"""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

import imagegpt_jax as ig
from imagegpt_jax.convert import formats
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import export
from imagegpt_jax.weight_files import files, safetensors_file

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "weights"
EXPECTED = np.load(GOLDEN / "expected.npz")
DECODERS = ("llama", "gpt2", "imagegpt")


def relative(got, expected):
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_transformers(name):
    gpt = ig.load_decoder(GOLDEN / name)
    assert relative(gpt.logits(EXPECTED["ids"]), EXPECTED[name]) < 1e-5


def test_llamagen_from_a_training_checkpoint_without_torch():
    gpt = ig.load_decoder(GOLDEN / "llamagen.pt", heads=2, grid=(4, 4))
    ids = EXPECTED["ids"].copy()
    ids[:, 0] = gpt.setup.space.class_start + np.array([1, 3])
    assert gpt.setup.space.begin == ids[1, 0]  # the last is "no class"
    assert relative(gpt.logits(ids), EXPECTED["llamagen"]) < 1e-5
    assert "torch" not in sys.modules


def test_tokenizer_in_half_precision():
    tok = ig.load_tokenizer(GOLDEN / "janus", batch_size=1)
    np.testing.assert_array_equal(tok.encode(EXPECTED["images"]), EXPECTED["codes"])
    codes = EXPECTED["ids"].ravel()[:16].reshape(1, 16)
    assert relative(tok.decode(codes), np.clip(EXPECTED["pixels"], -1, 1)) < 1e-4


def test_colours():
    tok = ig.load_tokenizer(GOLDEN / "imagegpt", batch_size=1)
    colours = np.array(json.loads((GOLDEN / "imagegpt/preprocessor_config.json").read_text())["clusters"])
    codes = tok.encode(EXPECTED["images"])
    pixels = EXPECTED["images"].reshape(2, -1, 3) / 127.5 - 1
    distances = np.square(pixels[:, :, None] - colours).sum(-1)
    np.testing.assert_array_equal(codes, distances.argmin(-1))
    np.testing.assert_allclose(tok.decode(codes).reshape(2, -1, 3), colours[codes], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [(name, "decoder", {}) for name in DECODERS]
    + [("janus", "tokenizer", {}), ("imagegpt", "tokenizer", {}), ("llamagen.pt", "decoder", {"heads": 2})],
)
def test_round_trips_give_the_same_bits(name, kind, options, tmp_path):
    source = GOLDEN / name
    export.convert(source, tmp_path / "portable", kind=kind, **options)
    export.convert(tmp_path / "portable", tmp_path / "back")
    before = formats.recognise(files.open_source(source), kind, formats.Options(**options))
    after = formats.recognise(files.open_source(tmp_path / "back"), kind)
    assert before.config == after.config
    assert set(before.tensors) == set(after.tensors)
    for key, tensor in before.tensors.items():
        assert after.tensors[key].dtype == tensor.dtype
        assert after.tensors[key].read().tobytes() == tensor.read().tobytes(), key
    load = ig.load_tokenizer if kind == "tokenizer" else ig.load_decoder
    if kind == "tokenizer":
        assert load(tmp_path / "portable").fingerprint == load(tmp_path / "back").fingerprint


def test_portable_folders_stand_alone(tmp_path):
    export.convert(GOLDEN / "llama", tmp_path / "portable")
    assert {p.name for p in (tmp_path / "portable").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "portable", moved)
    assert relative(ig.load_decoder(moved).logits(EXPECTED["ids"]), EXPECTED["llama"]) < 1e-5
    card = (moved / "README.md").read_text()
    assert "Llama (transformers)" in card
    assert "| `width` | `16` |" in card


def test_pictures_are_drawn_with_imported_weights():
    tok, gpt = (load(GOLDEN / "imagegpt") for load in (ig.load_tokenizer, ig.load_decoder))
    images_BHWC = ig.generate(gpt, tok, [""], num_images=2)
    assert images_BHWC.shape == (2, 4, 4, 3)
    with pytest.raises(UserError, match="is a language model"):
        ig.generate(ig.load_decoder(GOLDEN / "llama"), tok, [""])


# ------------------------------------------------------------------------------------------------------ our own runs


def test_a_run_becomes_a_portable_folder(workdirs, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    export.convert(workdirs.tokenizer, tmp_path / "tokenizer")
    trained, exported = ig.load_tokenizer(workdirs.tokenizer), ig.load_tokenizer(tmp_path / "tokenizer")
    assert trained.fingerprint == exported.fingerprint
    np.testing.assert_array_equal(trained.encode(images), exported.encode(images))

    export.convert(workdirs.decoder, tmp_path / "decoder")
    trained, exported = ig.load_decoder(workdirs.decoder), ig.load_decoder(tmp_path / "decoder")
    np.testing.assert_array_equal(trained.logits(EXPECTED["ids"]), exported.logits(EXPECTED["ids"]))
    prompt = "noto emoji of pizza"
    assert exported.encode_text(prompt) == trained.encode_text(prompt) != []


def test_what_another_layout_has_no_place_for_is_told(workdirs, tmp_path):
    with pytest.raises(UserError, match=r"no LlamaGen VQ-16, VQ-8: that has no .*stem_patch=4"):
        export.convert(workdirs.tokenizer, tmp_path / "out", to="llamagen_vq")
    export.convert(GOLDEN / "llama", tmp_path / "portable")
    with pytest.raises(UserError, match="is a decoder, and Janus VQVAE .* a tokenizer"):
        export.convert(tmp_path / "portable", tmp_path / "out", to="janus")


# ------------------------------------------------------------------------------------------------------------ command


def run(*arguments):
    command_line = [sys.executable, "-m", "imagegpt_jax.convert", *map(str, arguments)]
    return subprocess.run(command_line, capture_output=True, text=True, check=False)


def test_the_command_prints_the_matrix_and_converts(tmp_path):
    done = run(GOLDEN / "janus", tmp_path / "out", "--to=llamagen_vq")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in formats.FORMATS)
    assert "LlamaGen VQ-16, VQ-8, from Janus VQVAE" in done.stderr
    names = safetensors_file.read(tmp_path / "out/model.safetensors")[0]
    assert "encoder.conv_blocks.0.res.0.conv1.weight" in names
    assert names["quantize.codebook_used"].shape == (65536,)


def test_the_command_ends_with_one_sentence(tmp_path):
    done = run(GOLDEN / "imagegpt", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "say which with --kind=decoder or --kind=tokenizer" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_decoder_finds_the_tokenizer_that_it_is_given_or_that_lies_beside_it():
    assert ig.load_decoder(GOLDEN / "imagegpt").load_tokenizer().num_codes == 16
    gpt = ig.load_decoder(GOLDEN / "llamagen.pt", heads=2, grid=(4, 4), tokenizer=GOLDEN / "janus")
    images_BHWC = ig.generate(gpt, gpt.load_tokenizer(), classes=[1, 2], cfg_scale=2.0)
    assert images_BHWC.shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match="holds a LlamaGen .*, and no tokenizer that is known"):
        ig.load_decoder(GOLDEN / "llamagen.pt", heads=2).load_tokenizer()
