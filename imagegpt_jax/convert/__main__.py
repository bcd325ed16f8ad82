"""Converts weights: `python -m imagegpt_jax.convert SOURCE TARGET [--to=LAYOUT]`.

SOURCE is a file or folder of published weights, a workdir of training, or a portable folder. TARGET becomes a portable
folder (safetensors, config.json, text tokenizer, model card), or with --to the layout of a published system. Without
arguments it prints which systems are read and written.
"""

import argparse
import pathlib
import sys

from imagegpt_jax import cli
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import logs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m imagegpt_jax.convert", description=__doc__)
    parser.add_argument("source", nargs="?", help="published weights, a workdir, or a portable folder")
    parser.add_argument("target", nargs="?", help="folder to write; must be empty or new")
    parser.add_argument("--to", default="", metavar="LAYOUT", help="a published layout: see the table")
    parser.add_argument("--kind", choices=("tokenizer", "decoder"), help="which of the two, if SOURCE holds both")
    parser.add_argument("--step", type=int, help="checkpoint of a workdir; the newest by default")
    parser.add_argument("--heads", type=int, help="of a LlamaGen decoder of unpublished size")
    arguments = parser.parse_args()
    if (arguments.source is None) != (arguments.target is None):
        parser.error("give SOURCE and TARGET, or neither to see the table")
    return arguments


def main() -> None:
    """Parses the command line and converts."""
    arguments = _arguments()
    logs.quiet()
    from imagegpt_jax.convert import formats
    from imagegpt_jax.inference import export

    if arguments.source is None:
        print(formats.table())
        return
    try:
        done = export.convert(
            pathlib.Path(arguments.source).expanduser(),
            pathlib.Path(arguments.target).expanduser(),
            to=arguments.to,
            kind=arguments.kind,
            step=arguments.step,
            heads=arguments.heads,
        )
    except UserError as e:
        cli.fail(e)
    except KeyboardInterrupt:
        cli.fail("stopped by a signal before the end.", 130)
    else:
        print(done, file=sys.stderr)
        print(formats.table())


if __name__ == "__main__":
    main()
