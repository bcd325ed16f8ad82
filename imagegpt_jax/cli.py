"""What every binary does around its `main`: parse flags, run, and end with one sentence when something is wrong."""

import os
import pathlib
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from imagegpt_jax.errors import EXIT_FAILURE, EXIT_USAGE, UserError, suggest
from imagegpt_jax.runtime import filesystem, logs

# The repository's folder of the same name, which is installed with the package.
_CONFIGS = pathlib.Path(__file__).with_name("configs")


def fail(message: object, code: int = EXIT_FAILURE) -> None:
    """Prints `error: ...` and exits."""
    text = " ".join(str(message).split())
    print(f"error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def print_help() -> None:
    """Prints what the binary does (its module docstring) and its own flags, one paragraph each."""
    main_module = sys.modules["__main__"]
    print((main_module.__doc__ or "").strip() + "\n\nflags:")
    own = flags.FLAGS.get_key_flags_for_module(main_module)
    shared = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    for flag in sorted({*own, *shared}, key=lambda f: f.name):
        default = "" if flag.default in (None, "", []) else f" (default: {flag.default_as_str})"
        text = textwrap.fill(f"{flag.help}{default}", 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        print(f"  --{flag.name}\n{text}")


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
        known = {n for n in flags.FLAGS if not n.startswith(("test_", "only_check", "pdb", "profile", "run_with"))}
        fail(f"unknown flag --{e.flagname}.{suggest(e.flagname, known)} See --help.", EXIT_USAGE)
    except flags.Error as e:
        fail(f"{str(e).rstrip('.')}. See --help.", EXIT_USAGE)
    except (AttributeError, KeyError) as e:  # an override of a key the config does not have
        words = " ".join(str(e.args[0] if e.args else e).split())
        fail(f"the config has no such key: {words}", EXIT_USAGE)
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
    filesystem.check(told, [os.environ.get(name, "") for name in ("TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR")])


def prepare_cache() -> None:
    """Makes the folder of compiled programs private, if JAX_COMPILATION_CACHE_DIR names one.

    What lies there is run: nobody else may write it.

    Raises:
      UserError: if others may.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not folder or "://" in folder:
        return
    if not os.path.isdir(folder):
        os.makedirs(folder, mode=0o700)
        os.chmod(folder, 0o700)  # whatever the umask is
    elif os.name == "posix" and os.stat(folder).st_mode & 0o022:
        raise UserError(
            f"others may write the compilation cache {folder}, from which programs are run: chmod go-w it, or set"
            " JAX_COMPILATION_CACHE_DIR to a folder of your own."
        )


def run(main: Callable[[], None], *, joins: bool = False) -> None:
    """Runs a binary: parses flags, calls `main`, exits 0, or non-zero with one sentence.

    Args:
      main: the program.
      joins: whether it runs in many processes. One that fails before it has joined the others then still tells them.
    """
    logs.quiet()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt

    def checked(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: flags are written --name=value. See --help.", EXIT_USAGE)
        if not flags.FLAGS["verbosity"].present:
            logs.errors_only()

        try:
            prepare_cache()
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
