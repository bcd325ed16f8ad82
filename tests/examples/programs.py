"""Parses a command of a Python program of ours as that program would, without running it."""

import argparse
import contextlib
import copy
import functools
import importlib.util
import pathlib
import re
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from imagegpt_jax import config as config_lib
from imagegpt_jax.convert.formats import FORMATS
from imagegpt_jax.data import holdout, ops, sources
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation.request import GenerationRequest
from imagegpt_jax.metrics.score import METRICS, NETWORKS
from imagegpt_jax.models import vq
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.sampling import settings
from imagegpt_jax.sampling.guidance import SCHEDULES
from imagegpt_jax.tasks import interface
from imagegpt_jax.tasks.tokenizer import adversarial
from imagegpt_jax.training import optimizers

ROOT = pathlib.Path(__file__).resolve().parents[2]

# What `imagegpt-jax NAME` runs.
PROGRAMS = {
    **{name: (f"imagegpt_jax/{name}.py",) for name in ("train", "encode", "sample", "evaluate")},
    **{name: (f"imagegpt_jax/{name}/__main__.py",) for name in ("convert", "checkpoint")},
    "pack": ("imagegpt_jax/pack.py", "imagegpt_jax/data/pack.py", "tools/pack_dataset.py"),
    "demo": ("imagegpt_jax/demo.py", "tools/demo.py"),
}
CONFIGS = next(folder for folder in (ROOT / "configs", ROOT / "imagegpt_jax" / "configs") if folder.is_dir())
SIZES = {"decoder": "L", "tokenizer": "vq16"}  # configs of which flags without a config may be
# Names of values that are entries of a table, or a user's own.
CHOICES = {"metrics": METRICS, "cfg_schedule": SCHEDULES}
# A value that the reader fills in.
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|[a-z]|.*[${].*")
NOT_INSTALLED = ("torch", "torch_fidelity", "cleanfid")  # what `make parity` installs


class WrongError(Exception):
    """Says what is wrong with an example."""


MISTAKES = (WrongError, flags.Error, UserError, AttributeError, KeyError, ValueError, TypeError, OSError)


# ------------------------------------------------------------------------------------------------- flags of programs


@contextlib.contextmanager
def own_flags():
    """An empty table of absl's flags in place of the process's: programs have flags of one name."""
    table = flags.FLAGS.__dict__
    saved, fresh = dict(table), flags.FlagValues()
    for module, made in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("absl"):
            for flag in made:
                fresh[flag.name] = copy.deepcopy(flag)
    table.clear()
    table.update(fresh.__dict__)
    try:
        yield
    finally:
        table.clear()
        table.update(saved)


@functools.cache
def load(path):
    """A program's module, imported once under a name of its own, and its flags; no module where that cannot be."""
    name = f"example_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with own_flags(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        patch.syspath_prepend(str(path.parent))
        before = set(flags.FLAGS)
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as e:
            if e.name not in NOT_INSTALLED:
                raise
            return None, set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', path.read_text()))
        defined = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - before}
        if not (defined or hasattr(module, "main")):  # its parser is made where it is run
            return None, set(re.findall(r'add_argument\(\s*"--(\w+)"', path.read_text()))
        return module, defined


def parser_of(module):
    """The argparse parser that a program makes."""

    def stop(self, args=None, namespace=None):
        raise StopIteration(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            (getattr(module, "_arguments", None) or module.main)()
        except StopIteration as e:
            (parser,) = e.args

    def error(message):
        raise WrongError(message)

    parser.error = error
    return parser


def parse(path, words, *, partial):
    """Parses what follows a program's name, as it would; and checks what can be before there are data and devices."""
    module, defined = load(path)
    if "--help" in words:
        return
    words = [word for word in words if "..." not in word or "=" in word]
    if module is None:
        unknown = [word for word in words if word.startswith("--") and word[2:].partition("=")[0] not in defined]
        if unknown:
            raise WrongError(f"no such flags: {unknown}")
        return
    if not defined:
        if partial and all(word.startswith("-") for word in words):
            words = [*words, "x", "y"]
        arguments = parser_of(module).parse_args(words)
        if getattr(arguments, "source", None) and arguments.target is None:
            raise WrongError("give SOURCE and TARGET")
        if getattr(arguments, "to", "") and not PLACEHOLDER.fullmatch(arguments.to) and arguments.to not in FORMATS:
            raise WrongError(f"--to={arguments.to} is no layout")
        return
    if hasattr(module, "joined"):
        words = module.joined(words)
    if "config" in defined and partial and not any(word.startswith("--config=") for word in words):
        return parse_of_any_config(path, words)
    if hasattr(module, "take_command"):
        with contextlib.suppress(SystemExit):
            module.take_command(["x", *words])
            words = words[1:]
    with own_flags():
        words = [word for word in map(located, words) if not filled_in(word, defined)]
        for name, flag in defined.items():
            mine = copy.deepcopy(flag)
            mine.validators = [] if partial else list(flag.validators)
            if name != "config":
                flags.FLAGS[name] = mine
        if "config" in defined:
            config_flags.DEFINE_config_file("config", None, "", sys_argv=["x", *words])
        rest = flags.FLAGS(["x", *words])[1:]
        if rest:
            raise WrongError(f"unexpected words {rest}")
        config = flags.FLAGS.config if "config" in defined else None
        if config is None and "config" in defined and not partial:
            raise WrongError("--config is missing")
        check_values({name: flags.FLAGS[name].value for name in defined if flags.FLAGS[name].present})
        if config is not None:
            check_config(config, runs=path.stem == "train" and not partial)
        if path.stem == "sample" and not partial:
            check_request(module)
        if path.stem == "evaluate" and not partial:
            check_scores(module)


def parse_of_any_config(path, words):
    """Parses words whose config is left out: keys of one of ours."""
    for name, size in SIZES.items():
        try:
            return parse(path, [f"--config={name}:size={size}", *words], partial=True)
        except MISTAKES:
            if name == list(SIZES)[-1]:
                raise


def located(word):
    """`--config=decoder:size=B` and `--config=configs/decoder.py:size=B` with the path of the file."""
    match = re.fullmatch(r"--config=(?:configs/)?(\w+)(?:\.py)?((?::.*)?)", word)
    if not match:
        return word
    if not (file := CONFIGS / f"{match[1]}.py").is_file():
        raise WrongError(f"there is no config {file.name}")
    return f"--config={file}{match[2]}"


def filled_in(word, defined):
    """Whether a word is a flag of a number whose value the reader fills in."""
    name, _, value = word[2:].partition("=")
    return name in defined and value and PLACEHOLDER.fullmatch(value) and defined[name].flag_type() != "string"


# ---------------------------------------------------------------------------------------------- what flags may hold


def check_values(values):
    """Checks values that a program looks up once it runs."""
    for name, table in CHOICES.items():
        value = values.get(name) or ()
        for entry in [value] if isinstance(value, str) else value:
            if entry not in table and ":" not in entry:
                raise WrongError(f"--{name}={entry} is none of {', '.join(table)}")
    for value in values.get("feature_weights") or ():
        network, equals, _ = value.partition("=")
        if equals and network not in NETWORKS:
            raise WrongError(f"--feature_weights={value} is of no network that there is")
    for name in ("data", "generation_data"):
        check_data(values.get(name) or "")
    if not PLACEHOLDER.fullmatch(values.get("ops") or "A"):
        ops.parse(values["ops"])


def check_data(spec):
    """Checks the kinds of a data set's parts."""
    for part in re.split(r"\s\+\s", spec) if spec else ():
        kind, _, rest = part.rpartition("*")[2].partition(":")
        if kind not in sources.KINDS and not ("." in kind and ":" in rest) and not PLACEHOLDER.fullmatch(spec):
            raise WrongError(f"{part} is of no kind of data that there is")


def check_config(config, *, runs):
    """Checks a config; of a training that is to run, also that it neither ends at once nor trains on noise."""
    data = config.get("data", {})
    for split in ("train", "validation"):
        check_data(data.get(split, ""))
        if f"{split}_ops" in data:
            ops.parse(data[f"{split}_ops"])
    if config.task not in interface.TASKS:
        return
    if "my_package" not in str(config):
        check_values_of_config(config)
    if not runs:
        return
    if config.task == "tokenizer" and config.loss.lpips and not config.loss.lpips_weights:
        raise WrongError("LPIPS has no weights: give --config.loss.lpips_weights")
    if config.task == "decoder":
        tokens = {split: "tokens:" in holdout.resolve(config).data[split] for split in holdout.SUBSETS}
        if len(set(tokens.values())) > 1:
            raise WrongError(f"one split holds images and the other token shards: {dict(tokens)}")
        if not config.tokenizer and not tokens["train"]:
            raise WrongError("no tokenizer, so what it learns is noise: give --config.tokenizer")


def check_values_of_config(config):
    """Checks names and numbers of a config as the tasks do, without their networks."""
    optimizers.make(config.optim, config.steps, {"kernel": ("embed", "mlp")})
    if config.task == "tokenizer":
        config_lib.to_dataclass(vq.VQConfig, config.model)
        config_lib.to_dataclass(adversarial.LossConfig, config.loss)
    else:
        settings.read(config.sampling)
        model = config.model.to_dict()
        length = model["feature_length"] or int(model["feature_width"] > 0)
        config_lib.to_dataclass(GPTConfig, {**model, "vocab_size": 8, "feature_length": length})


def check_request(module):
    """Checks what `sample` is asked for, as far as the files that it names are not read."""
    if module.PROMPTS_FILE.value or module.FROM_IMAGE.value:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationRequest, "hashed", lambda self: self)
        module.request_of_flags(None)


def check_scores(module):
    """Checks what `evaluate` is asked for."""
    given = [flag for flag in (module.CHECKPOINT, module.IMAGES, module.COMPARE) if flag.value]
    if len(given) != 1 or not (module.OUTPUT.value or module.COMPARE.value):
        raise WrongError("give one of --checkpoint, --images and --compare, and --output")
    if module.SAMPLER.value:
        from imagegpt_jax.evaluation import generate_for_prompts

        generate_for_prompts.parse_sampler(module.SAMPLER.value)


def program(words):
    """The file of a Python program of ours that a command runs, and what follows; None for any other command."""
    first, *rest = words
    if first == "imagegpt-jax" and rest and rest[0] != "--help":
        if rest[0] not in PROGRAMS:
            raise WrongError(f"imagegpt-jax has no {rest[0]}")
        return next(ROOT / p for p in PROGRAMS[rest[0]] if (ROOT / p).is_file()), rest[1:]
    if first.startswith("imagegpt_jax."):
        return of_module(first), rest
    if re.fullmatch(r"(.*/)?python3?", first) and rest[:1] == ["-m"]:
        return of_module(rest[1]), rest[2:]
    if re.fullmatch(r"(.*/)?python3?", first) and rest and rest[0].endswith(".py"):
        if not (ROOT / rest[0]).is_file():
            raise WrongError(f"there is no {rest[0]}")
        return ROOT / rest[0], rest[1:]
    return None


def of_module(name):
    path = ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__main__.py"):
        if file.is_file():
            return file
    raise WrongError(f"there is no program {name}")


@functools.cache
def config_keys(name):
    """Every key of a shipped config, those of inner nodes too."""
    flat = config_lib.flatten(config_lib.sibling(str(CONFIGS / "x.py"), f"{name}.py").get_config("size=test").to_dict())
    return {".".join(parts[:n]) for parts in (key.split(".") for key in flat) for n in range(1, len(parts) + 1)}
