"""The folders of a run's checkpoints: which steps there are, what is left of a save that was cut off, what is kept.

W/checkpoints/<step>/manifest.json.tmp   from the beginning of a save until its manifest is whole
W/checkpoints/<step>/state/              written by Orbax
W/checkpoints/<step>/manifest.json       written last
W/checkpoints/damaged/<step>[-n]/        steps that did not verify, set aside
"""

import contextlib
import os
from collections.abc import Sequence

from etils import epath

from imagegpt_jax.checkpoint import manifest as manifest_lib
from imagegpt_jax.checkpoint.manifest import Damaged, Manifest
from imagegpt_jax.errors import UserError

STATE = "state"
_ASIDE = "damaged"
# A manifest has this name from the moment on when its step is being deleted.
_DELETED = f"{manifest_lib.NAME}.deleted"


def root(workdir: epath.PathLike) -> epath.Path:
    """The folder of a run's checkpoints."""
    folder = epath.Path(workdir).expanduser()
    return (folder if "://" in os.fspath(folder) else folder.resolve()) / "checkpoints"


def numbered(workdir: epath.PathLike) -> list[int]:
    """All steps that have a folder, finished or not, ascending. Raises UserError if that of checkpoints is a file."""
    folder = root(workdir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: it should be the folder of a run's checkpoints; move it away.")
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name)


def finished(workdir: epath.PathLike) -> list[int]:
    """The steps that have a manifest, ascending; whether it verifies is not looked at."""
    return [step for step in numbered(workdir) if (root(workdir) / str(step) / manifest_lib.NAME).exists()]


def readable(workdir: epath.PathLike) -> dict[int, Manifest]:
    """The steps whose manifests are as they were written, ascending; their files are not read."""
    manifests = {}
    for step in finished(workdir):
        with contextlib.suppress(Damaged):
            manifests[step] = manifest_lib.read(root(workdir) / str(step))
    return manifests


def is_unfinished(folder: epath.Path) -> bool:
    """Whether a step's folder is what a cut off save or deletion leaves: nothing that was ever a checkpoint."""
    if (folder / manifest_lib.NAME).exists():
        return False
    return any((folder / name).exists() for name in (manifest_lib.PENDING, _DELETED)) or not (folder / STATE).exists()


def ever_saved(workdir: epath.PathLike) -> bool:
    """Whether the run has, or had, a checkpoint: anything but what a first save that was cut off leaves."""
    folder = root(workdir)
    steps = [folder / str(step) for step in numbered(workdir)]
    cut_off = {path.name for path in steps if is_unfinished(path) and not (path / _DELETED).exists()}
    return folder.exists() and any(path.name not in cut_off for path in folder.iterdir())


def set_aside(workdir: epath.PathLike, step: int) -> epath.Path:
    """Moves a damaged step out of the way; returns where to."""
    aside = root(workdir) / _ASIDE
    aside.mkdir(parents=True, exist_ok=True)
    names = {p.name for p in aside.iterdir()}
    name = next(n for n in (str(step), *(f"{step}-{i}" for i in range(1, len(names) + 2))) if n not in names)
    (root(workdir) / str(step)).rename(aside / name)
    return aside / name


def begin(workdir: epath.PathLike, step: int) -> epath.Path:
    """Makes the folder of a step that is about to be written; one of that name is deleted first."""
    folder = root(workdir) / str(step)
    if folder.exists():
        delete(workdir, step)
    folder.mkdir(parents=True)
    (folder / manifest_lib.PENDING).write_text("")
    return folder


def delete(workdir: epath.PathLike, step: int) -> None:
    """Deletes a step so that it does not exist from the first moment on, however far the deletion comes."""
    folder = root(workdir) / str(step)
    if os.path.islink(folder):  # somebody moved it elsewhere, where it stays
        folder.unlink()
        return
    if (folder / manifest_lib.NAME).exists():
        (folder / manifest_lib.NAME).replace(folder / _DELETED)
    (folder / STATE).rmtree(missing_ok=True)  # before what tells that it is no checkpoint
    folder.rmtree(missing_ok=True)


def to_delete(steps: Sequence[Manifest], *, keep: int, keep_every_hours: float, best: str) -> list[int]:
    """Which steps a policy gives up; the newest never is.

    Args:
      steps: the steps that exist, ascending.
      keep: how many of the newest stay; 0 = all.
      keep_every_hours: besides, one of every so many hours stays for ever; 0 = none.
      best: besides, the step with the highest of this validation score stays, or with "-" before its name the lowest;
        "" = none.
    """
    if not keep:
        return []
    stay = {manifest.step for manifest in steps[-keep:]}
    if keep_every_hours:
        last = None
        for manifest in steps:
            if last is None or manifest.time - last >= 3600 * keep_every_hours:
                last = manifest.time
                stay.add(manifest.step)
    sign, name = (-1.0 if best.startswith("-") else 1.0), best.removeprefix("-")
    scored = [(sign * manifest.metrics[name], -manifest.step) for manifest in steps if name in manifest.metrics]
    if scored:
        stay.add(-max(scored)[1])
    return [manifest.step for manifest in steps if manifest.step not in stay]
