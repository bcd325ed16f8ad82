"""What every binary does around its `main`: parse flags, run, and end with one sentence when something is wrong."""

import contextlib
import os
import pathlib
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from imagegpt_jax.errors import EXIT_FAILURE, EXIT_USAGE, UserError, suggest, suggest_key
from imagegpt_jax.runtime import compiled, filesystem, logs

# The repository's folder of the same name, which is installed with the package.
_CONFIGS = pathlib.Path(__file__).with_name("configs")


def fail(message: object, code: int = EXIT_FAILURE) -> None:
    """Prints `error: ...` and exits."""
    text = " ".join(str(message).split())
    print(f"error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _own_flags() -> list[flags.Flag]:
    """The flags of the program, in the order of their definition, without other names of the same."""
    modules = (sys.modules[__name__], sys.modules["__main__"])
    own = {flag.name: flag for module in modules for flag in flags.FLAGS.get_key_flags_for_module(module)}
    return [flag for flag in own.values() if not (flag.help or "").startswith("Alias for")]


def _is_required(flag: flags.Flag) -> bool:
    return any("other than None" in validator.message for validator in flag.validators)


def _describe(flag: flags.Flag) -> str:
    """A flag and what it is for, without what absl adds."""
    several = isinstance(flag, flags.MultiFlag) and "several times" not in flag.help
    text = (flag.help or "").partition(";\n")[0] + several * " May be given several times."
    if flag.default not in (None, "", [], False):
        text += f" (default: {','.join(flag.default) if isinstance(flag.default, list) else flag.default})"
    return f"  --{flag.name}\n" + textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)


def print_help() -> None:
    """Prints what the binary does (its module docstring) and its own flags, a paragraph each, the required ones first.

    A binary with many flags has `FLAG_GROUPS`: the first flag of a group -> its title.
    """
    main_module, own = sys.modules["__main__"], _own_flags()
    titles = getattr(main_module, "FLAG_GROUPS", {})
    parts = [(main_module.__doc__ or "").strip()]
    if required := [flag for flag in own if _is_required(flag)]:
        parts += ["\nRequired:", *map(_describe, required)]
    if own[len(required) :] and not titles:
        parts.append("\nOptional:")
    for flag in own:
        parts += [f"\n{titles[flag.name]}:"] if flag.name in titles else []
        parts += [] if flag in required else [_describe(flag)]
    print("\n".join(parts))


def find_config(name: str) -> str:
    """The config file that `--config` means, with its arguments: one of the working folder, or one of ours.

    Args:
      name: a path such as `configs/decoder.py:size=B`, or in short `decoder:size=B`.

    Raises:
      UserError: if there is no such file.
    """
    file, colon, arg = name.partition(":")
    ours = {path.stem: path for path in sorted(_CONFIGS.glob("*.py"))}
    path = pathlib.PurePath(f"configs/{file}.py" if file in ours else file)  # a name is short for this path
    if os.path.exists(path):
        return f"{path}{colon}{arg}"
    if path.stem in ours and path.parts == ("configs", f"{path.stem}.py"):
        return f"{ours[path.stem]}{colon}{arg}"
    hint = suggest(path.stem, ours)
    raise UserError(f"there is no config file {file}.{hint} Give a file, or one of ours: {', '.join(ours)}.")


def define_config() -> flags.FlagHolder:
    """Defines `--config`, a file with `get_config` (see `find_config`), whose keys `--config.a.b=value` overrides."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file and its arguments, such as configs/tokenizer.py:size=emoji, or tokenizer:size=emoji in short; any"
        " key of it is set by --config.key=value.",
    )
    flags.mark_flag_as_required("config")
    return holder


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses absl flags; every way this can go wrong becomes one sentence."""
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print_help()
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(_with_config(list(argv)) if "config" in flags.FLAGS else list(argv))
        _expand_home()
        if "config" in flags.FLAGS and not isinstance(flags.FLAGS.config, ConfigDict):
            flags.FLAGS.config.to_dict()  # a config that could not be made stands for its error until it is used
        return rest
    except flags.UnrecognizedFlagError as e:
        known = [flag.name for flag in _own_flags()]
        fail(f"unknown flag --{e.flagname}.{suggest(e.flagname, known)} See --help.", EXIT_USAGE)
    except flags.Error as e:
        fail(f"{_plainly(e)} See --help.", EXIT_USAGE)
    except (AttributeError, KeyError) as e:
        fail(_no_such_key(argv, e), EXIT_USAGE)
    except OSError as e:
        why = str(e.__cause__ or e).replace("Failed loading config file", "")
        fail(f"the config could not be read: {why}", EXIT_USAGE)
    except (UserError, ValueError, TypeError) as e:
        fail(e, EXIT_USAGE)
    raise AssertionError("unreachable")


def _with_config(argv: list[str]) -> list[str]:
    """The arguments with the path of the config file that is meant."""
    for i, argument in enumerate(argv):
        if argument in ("--config", "-config") and i + 1 < len(argv):
            argv[i + 1] = find_config(argv[i + 1])
        elif argument.startswith(("--config=", "-config=")):
            argv[i] = f"--config={find_config(argument.partition('=')[2])}"
    return argv


def _plainly(error: flags.Error) -> str:
    """What absl or ml_collections says of a flag, in our words."""
    missing = [flag for flag in _own_flags() if _is_required(flag) and flag.value is None]
    if "other than None" in str(error) and missing:
        return " ".join(f"--{flag.name} is required: {flag.help}" for flag in missing)
    wrong = re.match(r"flag --(\S+?)=(.*?): ", str(error), re.DOTALL)
    if not wrong or wrong[1] not in flags.FLAGS:
        return f"{str(error).rstrip('.')}."
    name, value, parser = wrong[1], wrong[2], flags.FLAGS[wrong[1]].parser
    if isinstance(parser, flags.EnumParser):
        return f"--{name}={value} is unknown.{suggest(value, parser.enum_values)} All: {', '.join(parser.enum_values)}."
    if "as a ConfigDict" in str(error):
        return f"--{name}={value}: {name} is a group of keys; set one of them, --{name}.KEY=VALUE."
    kind = "true or false" if isinstance(parser, flags.BooleanParser) else parser.syntactic_help
    return f"--{name}={value} is not {kind}." if kind else f"--{name}={value}: {str(error)[wrong.end() :].rstrip('.')}."


def _no_such_key(argv: Sequence[str], error: Exception) -> str:
    """Which override is of a key that the config does not have, and what was meant."""

    def keys(config: Any, prefix: str = "") -> list[str]:
        inner = {k: keys(v, f"{prefix}{k}.") if isinstance(v, Mapping | ConfigDict) else [] for k, v in config.items()}
        return [key for k in inner for key in (inner[k] or [f"{prefix}{k}"])]

    given = [match[1] for arg in argv if (match := re.match(r"--?(?:no)?config\.([^=]+)", arg))]
    files = [match[1] for match in re.finditer(r"(?:^|\0)--?config[=\0]([^\0]+)", "\0".join(argv))]
    with contextlib.suppress(Exception):  # the file itself may be what is wrong
        known = keys(flags.FLAGS["config"].parser.parse(find_config(files[-1])))
        for path in given:
            if not any(f"{key}.".startswith(f"{path}.") for key in known):
                return f"the config has no key {path!r}.{suggest_key(path, known)}"
    what = str(error.args[0] if error.args else error).strip("\"'")
    return f"the config file could not be run: {type(error).__name__}: {what}"


def _expand_home() -> None:
    """Does for --name=~/folder what shells do for words that begin so."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if isinstance(flag.value, str) and flag.value.startswith("~/"):
            flag.value = os.path.expanduser(flag.value)
        elif isinstance(flag.value, list):
            flag.value = [os.path.expanduser(v) if str(v).startswith("~/") else v for v in flag.value]


def _check_buckets() -> None:
    """`filesystem.check` of all that the program is told: flags, the config, and variables of TFDS and JAX."""
    told = [v.to_dict() if hasattr(v, "to_dict") else v for v in flags.FLAGS.flag_values_dict().values()]
    filesystem.check(told, [os.environ.get(name, "") for name in ("TFDS_DATA_DIR", compiled.VARIABLE)])


def run(main: Callable[[], None], *, joins: bool = False, cache: bool = False) -> None:
    """Runs a binary: parses flags, calls `main`, exits 0, or non-zero with one sentence.

    Args:
      main: the program.
      joins: whether it runs in many processes. One that fails before it has joined the others then still tells them.
      cache: whether compiled programs are kept for the next start; not in tools that measure compiling.
    """
    logs.quiet()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt

    def checked(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: flags are written --name=value. See --help.", EXIT_USAGE)
        if not flags.FLAGS["verbosity"].present:
            logs.errors_only()

        try:
            compiled.prepare(default=cache)
            _check_buckets()
            main()
        except UserError as e:
            if joins:
                from imagegpt_jax.runtime import distributed

                distributed.report_failure(e)
            fail(e)
        except KeyboardInterrupt:
            fail("stopped by a signal before the end.", 130)

    app.run(checked, flags_parser=_parse)
