"""Lists, verifies, repairs and compares the checkpoints of a training run.

python -m imagegpt_jax.checkpoint ls runs/decoder              # every step: size, age, position, scores
python -m imagegpt_jax.checkpoint verify runs/decoder          # reads every byte; status 1 if a step is damaged
python -m imagegpt_jax.checkpoint repair runs/decoder          # sets damaged steps aside, deletes unfinished ones
python -m imagegpt_jax.checkpoint diff runs/decoder 1000 2000  # config, versions, and how far parameters moved
"""

import argparse
import sys
import time

from etils import epath

from imagegpt_jax import cli, errors
from imagegpt_jax.checkpoint import comparing, folders
from imagegpt_jax.checkpoint import manifest as manifest_lib
from imagegpt_jax.checkpoint.manifest import Damaged
from imagegpt_jax.runtime import filesystem, logs


def ls(workdir: epath.Path) -> None:
    """Prints a line for each step; the manifests are read, the files are not."""
    now = time.time()
    for step in folders.numbered(workdir):
        folder = folders.root(workdir) / str(step)
        try:
            manifest = manifest_lib.read(folder)
        except Damaged as e:
            print(f"{step:>10}  {'unfinished' if folders.is_unfinished(folder) else f'damaged: {e}'}")
            continue
        size = sum(size for size, _ in manifest.files.values())
        hours = (now - manifest.time) / 3600
        scores = "  ".join(f"{name} {value:.4g}" for name, value in sorted(manifest.metrics.items()))
        line = f"{step:>10}  {size / 1e6:>10.1f} MB  {hours:>8.1f} h ago  position {manifest.position}  {scores}"
        print(line.rstrip())


def verify(workdir: epath.Path) -> int:
    """Reads every byte of every step; returns the exit status."""
    status = 0
    for step in folders.numbered(workdir):
        folder = folders.root(workdir) / str(step)
        if folders.is_unfinished(folder):
            print(f"{step:>10}  unfinished: what a save that was cut off leaves")
            continue
        started = time.perf_counter()
        try:
            manifest = manifest_lib.check(folder)
        except Damaged as e:
            status = 1
            print(f"{step:>10}  damaged: {e}")
            continue
        unknown = sorted(set(manifest_lib.list_files(folder)) - set(manifest.files))
        size = sum(size for size, _ in manifest.files.values())
        note = f"; not of the checkpoint: {', '.join(unknown)}" if unknown else ""
        print(f"{step:>10}  sound: {size / 1e6:.1f} MB in {time.perf_counter() - started:.2f} s{note}")
    return status


def repair(workdir: epath.Path) -> None:
    """Leaves only steps that verify; not while the run trains."""
    for step in folders.numbered(workdir):
        folder = folders.root(workdir) / str(step)
        if folders.is_unfinished(folder):
            folders.delete(workdir, step)
            print(f"{step:>10}  unfinished: deleted")
            continue
        try:
            manifest_lib.check(folder)
            print(f"{step:>10}  sound")
        except Damaged as e:
            print(f"{step:>10}  damaged: {e}; moved to {folders.set_aside(workdir, step)}")


def diff(workdir: epath.Path, chosen: list[int]) -> None:
    """Compares two steps, the last two by default."""
    have = folders.finished(workdir)
    if not chosen and len(have) < 2:
        raise errors.UserError(f"{workdir} has {len(have)} finished checkpoints: there are not two to compare.")
    for step in chosen:
        if step not in have:
            raise errors.UserError(f"{workdir} holds no checkpoint of step {step}: it has {', '.join(map(str, have))}.")
    if len(chosen) == 1 or len(chosen) > 2:
        raise errors.UserError("give two steps to compare, or none for the last two.")
    a, b = chosen or have[-2:]
    print("\n".join(comparing.compare(workdir, a, b)))


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m imagegpt_jax.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("ls", "verify", "repair", "diff"))
    parser.add_argument("workdir", help="folder of a training run, local or gs://")
    parser.add_argument("steps", type=int, nargs="*", help="of diff: the two steps to compare (default: the last two)")
    args = parser.parse_args(argv)
    workdir = epath.Path(args.workdir).expanduser()
    try:
        filesystem.check(args.workdir)
        if args.steps and args.command != "diff":
            raise errors.UserError(f"{args.command} takes no steps: it goes through all.")
        if not folders.root(workdir).is_dir():
            raise errors.UserError(f"{workdir} holds no checkpoints: give the --workdir of a training run.")
        if args.command == "diff":
            diff(workdir, args.steps)
        elif not folders.numbered(workdir):
            print(f"{workdir} holds no checkpoint yet")
        elif args.command == "verify":
            return verify(workdir)
        elif args.command == "ls":
            ls(workdir)
        else:
            with filesystem.writing(folders.root(workdir)):
                repair(workdir)
        return 0
    except Exception as e:
        if filesystem.is_refusal(e):
            cli.fail(
                f"{workdir} cannot be read ({filesystem.reason(e)}): check its permissions, or give another folder."
            )
        if isinstance(e, errors.UserError | Damaged):
            cli.fail(e)
        raise


if __name__ == "__main__":
    logs.quiet()
    sys.exit(main())
