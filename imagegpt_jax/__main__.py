"""One command for all binaries: `imagegpt-jax train ...` is `python -m imagegpt_jax.train ...`."""

import ast
import importlib.metadata
import pathlib
import runpy
import sys

from imagegpt_jax import cli, errors

COMMANDS = ("train", "encode", "sample", "evaluate", "convert", "checkpoint", "pack", "demo")


def _summary(command: str) -> str:
    """The first line of a binary's docstring, read without importing what the binary needs."""
    path = pathlib.Path(__file__).with_name(command)
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(source.read_text())) or "").splitlines()[0]


def main() -> None:
    """Runs the binary that the first argument names, with the others."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print("imagegpt-jax COMMAND [--flag=value ...]; COMMAND --help shows its flags.\n")
        for command in COMMANDS:
            print(f"  {command:12}{_summary(command)}")
        return
    if name == "--version":
        print(importlib.metadata.version("imagegpt_jax"))
        return
    if name not in COMMANDS:
        cli.fail(
            f"unknown command {name!r}.{errors.suggest(name, COMMANDS)} See imagegpt-jax --help.", errors.EXIT_USAGE
        )
    sys.argv = [f"imagegpt-jax {name}", *rest]
    runpy.run_module(f"imagegpt_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
