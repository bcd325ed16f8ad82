import pathlib
import types

import pytest

from imagegpt_jax import config as config_lib
from imagegpt_jax.errors import SHARE, SYNONYMS, UserError, above, at_least, check_ranges, suggest, suggest_key

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("allowed", "good", "bad", "words"),
    [
        (at_least(1), (1, 1e9, float("inf")), (0.5, float("nan")), "at least 1"),
        (at_least(0, "0 keeps all", whole=True), (0, 3, 4.0), (-1, 2.5), r"a whole number, at least 0 \(0 keeps all\)"),
        (at_least(0, below=1), (0, 0.9), (1, -0.1), "at least 0 and below 1"),
        (at_least(0, below=float("inf")), (0, 1e9), (float("inf"),), "at least 0"),
        (above(0, at_most=1), (0.1, 1), (0, 1.1, float("nan")), "above 0 and at most 1"),
        (SHARE, (0, 1), (-0.1, 1.1), "at least 0 and at most 1"),
    ],
)
def test_numbers_lie_in_their_ranges(allowed, good, bad, words):
    for value in good:
        check_ranges(types.SimpleNamespace(a=types.SimpleNamespace(b=value)), {"a.b": allowed})
    for value in bad:
        with pytest.raises(UserError, match=rf"--config\.a\.b={value} must be {words}\.$"):
            check_ranges(types.SimpleNamespace(a=types.SimpleNamespace(b=value)), {"a.b": allowed}, "--config.")


def keys(task):
    config = config_lib.sibling(str(ROOT / "configs" / "x.py"), f"{task}.py").get_config("size=test")
    return list(config_lib.flatten(config.to_dict()))


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("xl", ["B", "L", "XL"], "XL"),
        ("Test", ["emoji", "test"], "test"),
        ("guidance-scale", ["cfg_scale", "cfg_end"], "cfg_scale"),
        ("promt", ["prompt", "prompts_file"], "prompt"),
    ],
)
def test_a_word_is_known_by_other_case_other_name_or_nearly(word, known, meant):
    assert suggest(word, known) == f" Did you mean {meant!r}?"


def test_without_a_near_word_all_are_listed():
    assert suggest("zzz", ["B", "L"]) == " Known: B, L."


@pytest.mark.parametrize(
    ("task", "path", "meant"),
    [
        ("decoder", "optim.learning_rate", "optim.lr"),
        ("decoder", "learning_rate", "optim.lr"),
        ("decoder", "model.num_layers", "model.depth"),
        ("decoder", "model.hidden_size", "model.width"),
        ("decoder", "optimizer", "optim.name"),
        ("decoder", "otpim.lr", "optim.lr"),
        ("decoder", "data.trian", "data.train"),
        ("decoder", "save_every", "checkpoint.every"),
        ("decoder", "batch-size", "batch_size"),
        ("decoder", "steps.x", "steps"),
        ("decoder", "untrained_tokenizer.optim.learning_rate", "untrained_tokenizer.optim.lr"),
        ("tokenizer", "discriminator_optimizer.lr", "discriminator_optim.lr"),
        ("tokenizer", "model.codebook_size", "model.quantizer.num_codes"),
        ("tokenizer", "image_size", "res"),
    ],
)
def test_a_key_is_known_wherever_it_stands(task, path, meant):
    assert suggest_key(path, keys(task)) == f" Did you mean {meant!r}?"


def test_without_a_near_key_those_beside_it_are_listed():
    assert suggest_key("optim.zzz", keys("decoder")).startswith(" Known: optim.b1, optim.b2, ")
    assert suggest_key("zzz.zzz", keys("decoder")).startswith(" Known: accumulate, batch_size, checkpoint, ")


def test_every_name_that_has_synonyms_is_a_key_or_a_flag():
    flags = "".join((ROOT / "imagegpt_jax" / f"{name}.py").read_text() for name in ("train", "sample", "evaluate"))
    flags += (ROOT / "imagegpt_jax" / "sampling" / "settings.py").read_text()
    flags += (ROOT / "imagegpt_jax" / "cli.py").read_text()
    known = {key.rpartition(".")[2] for task in ("decoder", "tokenizer") for key in keys(task)}
    assert [
        name for name in SYNONYMS if name not in known and f'"{name}"' not in flags and f"{name}:" not in flags
    ] == []
