"""What is wrong with a command that the repository shows: its program, flags, values, config keys and files."""

import functools
import importlib.util
import itertools
import pathlib
import re
import shlex
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
SBATCH = {"nodes", "ntasks-per-node", "gpus-per-node", "gpus-per-task", "gpu-bind"}


def beside(name):
    """Imports the file of this folder."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", pathlib.Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


commands, programs = beside("commands"), beside("programs")


def check(example):
    """Checks one example."""
    words = list(example.words)
    partial = example.partial or not example.shown
    if own_config(example):
        words, partial = [word for word in words if not word.startswith("--config")] or ["make", "test"], True
    first = words[0]
    if found := programs.program(words):
        if found[1] or example.shown:  # else a name in a sentence
            programs.parse(*found, partial=partial)
    elif first.startswith("--"):
        check_fragment(example)
    elif first == "sbatch":
        at = words.index("launch/slurm.sbatch")
        if unknown := [word for word in words[1:at] if word[2:].partition("=")[0] not in SBATCH]:
            raise programs.WrongError(f"options that sbatch does not have: {unknown}")
        check_script("launch/slurm.sbatch", words[at + 1 :], partial=partial)
    elif match := re.fullmatch(r"(?:launch/)?(\w+\.(?:sh|sbatch))", words[words[0] == "bash"]):
        check_script(f"launch/{match[1]}", words[1 + (words[0] == "bash") :], partial=partial)
    elif first == "sky":
        check_sky(words, partial=partial)
    elif words[:2] == ["docker", "run"]:
        inside = words[words.index("IMAGE") + 1 :]
        inside = ["imagegpt-jax", *inside] if inside[0] in programs.PROGRAMS else inside
        programs.parse(*programs.program(inside), partial=partial)
    elif words[:2] == ["docker", "build"]:
        check_files(word.partition("=")[2] for word in words if word.startswith("--file="))
        check_extras(word.removeprefix("--build-arg=EXTRAS=") for word in words if word.startswith("--build-arg="))
    elif first == "make":
        if not re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
            raise programs.WrongError(f"the Makefile has no {words[1]}")
    elif first == "pip":
        check_extras(re.findall(r"\[([\w,]+)\]", " ".join(words)))


def own_config(example):
    """Whether an example is of a config file that its page writes."""
    files = [word[9:].partition(":")[0] for word in example.words if word.startswith("--config=")]
    if not files or "/" in files[0] or not files[0].endswith(".py"):
        return False
    return (ROOT / example.where.partition(":")[0]).read_text().count(files[0]) > 1


def check_fragment(example):
    """Flags without their program: some program of ours takes them all."""
    words = list(example.words)
    names = frozenset(word[2:].partition("=")[0] for word in words if word.startswith("--"))
    if names <= SBATCH | {"help"} or any(re.fullmatch(r"config\.([A-Z]+|[a-z](\.[a-z])*)", name) for name in names):
        return  # SLURM's, absl's, and any key
    if example.where.startswith("launch/") and any(names <= script_flags(p).keys() for p in ROOT.glob("launch/*.*")):
        return
    owners = [ROOT / "imagegpt_jax/train.py"] if any(n.startswith("config") for n in names) else flag_owners(names)
    if len(words) == 1 and "=" not in words[0]:  # named, not given
        key = words[0].removeprefix("--config.")
        if not owners or (key != words[0] and not any(key in programs.config_keys(name) for name in programs.SIZES)):
            raise programs.WrongError(f"there is no {words[0]}")
        return
    mistakes = []
    for path in owners:
        try:
            return programs.parse(path, words, partial=True)
        except programs.MISTAKES as e:
            mistakes.append(str(e))
    raise programs.WrongError(f"no program takes these: {mistakes}")


@functools.cache
def flag_owners(names):
    """Programs that have all these flags, the four binaries first."""
    files = [ROOT / f"imagegpt_jax/{name}.py" for name in ("train", "encode", "sample", "evaluate")]
    files += sorted(path for path in ROOT.glob("tools/**/*.py") if "DEFINE_" in path.read_text())
    return [path for path in files if all(re.search(rf'"{n}"|^      {n}: ', source(path), re.MULTILINE) for n in names)]


def source(path):
    """A program's text; that of `sample` with the settings whose fields are flags."""
    settings = ("sampling/settings.py", "generation/postprocess.py") if path.stem == "sample" else ()
    return "\n".join(p.read_text() for p in (path, *(ROOT / "imagegpt_jax" / name for name in settings)))


def script_flags(path):
    """Flag of a launch script -> whether it takes a value."""
    return dict(re.findall(r"^ +--(\w+)(=\*)?(?: \| -h)?\)", path.read_text(), re.MULTILINE))


def check_script(name, words, *, partial):
    """Checks a command of `launch/`: the script's own flags, then those of the binary after --."""
    check_files([name])
    text, known = (ROOT / name).read_text(), script_flags(ROOT / name)
    if actions := re.search(r"^  ([a-z]+(?: \| [a-z]+)+)\) action=", text, re.MULTILINE):
        if words and words[0] not in actions[1].split(" | "):
            raise programs.WrongError(f"{name} has no action {words[0]}")
        words = words[1:]
    at = words.index("--") if "--" in words else len(words)
    for word in words[:at]:
        flag, equals, _ = word[2:].partition("=")
        if not word.startswith("--") or flag not in known or bool(known[flag]) != bool(equals):
            raise programs.WrongError(f"{name} does not take {word}")
    binary = next((word[9:] for word in words[:at] if word.startswith("--binary=")), "train")
    if arguments := words[at + 1 :]:
        partial = partial or arguments == ["..."]
        programs.parse(*programs.program([f"imagegpt_jax.{binary}", *arguments]), partial=partial)


def check_sky(words, *, partial):
    """Checks what SkyPilot is told."""
    check_files(word for word in words if word.startswith("launch/"))
    declared = re.search(r"^envs:\n((?:  .*\n)*)", (ROOT / "launch/skypilot.yaml").read_text(), re.MULTILINE)
    settings = dict(b.partition("=")[::2] for a, b in itertools.pairwise(words) if a == "--env")
    for name, value in settings.items():
        if not re.search(rf"^  {name}:", declared[1], re.MULTILINE):
            raise programs.WrongError(f"launch/skypilot.yaml has no {name}")
        if name == "EXTRAS":
            check_extras([value])
        if name == "ARGS":
            binary = settings.get("BINARY", "train")
            programs.parse(*programs.program([f"imagegpt_jax.{binary}", *shlex.split(value)]), partial=partial)


def check_files(names):
    for name in names:
        if not (ROOT / name).exists():
            raise programs.WrongError(f"there is no {name}")


def check_extras(lists):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ",".join(lists).split(","):
        if name and name not in known:
            raise programs.WrongError(f"the package has no extra {name}")


def mistake(example):
    """What is wrong with an example, or None."""
    try:
        check(example)
    except programs.MISTAKES as e:
        return f"{example}\n    {type(e).__name__}: {' '.join(str(e).split())[:400]}"
    return None


# What pages and messages name: files of the repository, keys of a config, programs, calls of the notebook.
FILE = re.compile(
    r"(?<![\w./}])((?:tools|configs|docs|launch|tests|imagegpt_jax)/[\w/]+\.(?:py|md|sh|json|yaml|sbatch))\b"
)
KEY = re.compile(r"--config\.((?:[a-z_][a-z0-9_]+\.)*[a-z_][a-z0-9_]+)(?!\w|\.?[{])")
MODULE = re.compile(r"python -m (imagegpt_jax\.\w+)")


def wrong_names(text):
    """What a text names that is not there."""
    keys = programs.config_keys("decoder") | programs.config_keys("tokenizer")
    yield from (name for name in FILE.findall(text) if not (ROOT / name).exists())
    yield from (f"--config.{key}" for key in KEY.findall(text) if key not in {*keys, "key"})
    for name in MODULE.findall(text):
        try:
            programs.of_module(name)
        except programs.WrongError:
            yield name
