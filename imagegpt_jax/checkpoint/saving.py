"""Saving and restoring the TrainState of a run, by all of its processes together."""

import contextlib
import importlib.metadata
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from imagegpt_jax import config as config_lib
from imagegpt_jax.checkpoint import folders, trees
from imagegpt_jax.checkpoint import manifest as manifest_lib
from imagegpt_jax.checkpoint.manifest import Damaged, Manifest
from imagegpt_jax.config import Config
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import distributed, event_log, filesystem
from imagegpt_jax.train_state import TrainState

_LIBRARIES = ("imagegpt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Checkpoints:
    """The checkpoints of one workdir, for the training loop.

    Args:
      workdir: the run's folder, local or `gs://`.
      config: the run's config. Of `config.checkpoint`: `every` (steps between checkpoints), and what is kept of them,
        see `folders.to_delete`.
      log: where saves and restores are noted.
    """

    def __init__(self, workdir: epath.PathLike, config: Config, log: event_log.Log | None = None):
        self._workdir, self._config = workdir, config
        self._log = log or event_log.Log(None)
        self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._finishing: threading.Thread | None = None
        self._error: BaseException | None = None

    def due(self, step: int, last: int) -> bool:
        """Whether to save after `step` steps of a run of `last`."""
        every = self._config.checkpoint.every
        return step == last or (every > 0 and step % every == 0)

    def save(
        self,
        step: int,
        state: TrainState,
        position: int,
        skipped: Sequence[tuple[int, int]] = (),
        metrics: Mapping[str, float] | None = None,
        evaluated: bool = True,
    ) -> None:
        """Starts to save; returns as soon as the arrays have left the devices. Arguments are fields of `Manifest`.

        Raises UserError if the save before this one failed.
        """
        started = time.perf_counter()
        self.wait()
        folder = folders.root(self._workdir) / str(step)
        manifest = Manifest(
            step=step,
            position=position,
            skipped=tuple(skipped),
            time=time.time(),
            metrics=dict(metrics or {}),
            evaluated=evaluated,
            config=config_lib.to_dict(self._config),
            versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
        )
        try:
            if distributed.is_main_process():
                folders.begin(self._workdir, step)
            distributed.barrier()
            self._writer.save(folder / folders.STATE, args=ocp.args.PyTreeSave(state))
        except Exception as e:
            raise self._failed(step, e) from e
        blocked = time.perf_counter() - started
        self._finishing = threading.Thread(
            target=self._finish, args=(folder, manifest, blocked), name="finish checkpoint", daemon=True
        )
        self._finishing.start()

    def _finish(self, folder: epath.Path, manifest: Manifest, blocked: float) -> None:
        """In the background: waits for the files of all processes, writes the manifest, deletes what is not kept."""
        started = time.perf_counter()
        try:
            self._writer.wait_until_finished()
            if distributed.is_main_process():
                manifest = manifest_lib.write(folder, manifest)
                self._log.write(
                    "save",
                    step=manifest.step,
                    position=manifest.position,
                    bytes=sum(size for size, _ in manifest.files.values()),
                    blocking_seconds=blocked,
                    background_seconds=time.perf_counter() - started,
                )
                policy, kept = self._config.checkpoint, list(folders.readable(self._workdir).values())
                for step in folders.to_delete(
                    kept, keep=policy.keep, keep_every_hours=policy.keep_every_hours, best=policy.keep_best
                ):
                    folders.delete(self._workdir, step)
        except BaseException as e:  # raised where the loop looks after it
            self._error = self._failed(manifest.step, e)

    def _failed(self, step: int, error: BaseException) -> Exception:
        if isinstance(error, UserError) or (isinstance(error, Exception) and distributed.is_loss_of_peer(error)):
            return error
        with contextlib.suppress(UserError):  # where nothing can be written, neither can this
            self._log.write("save_failed", step=step, reason=distributed.first_line(error))
        return UserError(
            f"the checkpoint of step {step} could not be written to {folders.root(self._workdir)}"
            f" ({filesystem.reason(error)}): make room or mend the file system, and start the same command again to"
            " continue from the checkpoint before."
        )

    def poll(self) -> None:
        """Raises the error of a save that has failed in the meantime; does not wait."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Waits for the save under way, and raises its UserError if it failed."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        self.poll()

    def restore(self, state: TrainState, last: int | None = None) -> tuple[TrainState, Manifest] | None:
        """The newest checkpoint that verifies, in the shardings of `state`; None if there is none.

        Every file is read and compared with the manifest first, each process taking a share of them. A step that does
        not verify is set aside, with a line on stderr, and the one before it is tried.

        Args:
          state: a state, or an abstract one whose leaves carry shardings.
          last: steps after this one are not looked at; None = all are.

        Raises:
          UserError: if there are checkpoints, and none verifies; or if the newest that does is of other networks.
        """
        started = time.perf_counter()
        share = (jax.process_index(), jax.process_count())
        candidates = [step for step in folders.numbered(self._workdir) if last is None or step <= last]
        distributed.barrier()  # nobody changes the folder before all have listed it
        damaged = []
        for step in reversed(candidates):
            folder = folders.root(self._workdir) / str(step)
            if folders.is_unfinished(folder):
                distributed.barrier()
                if distributed.is_main_process():
                    folders.delete(self._workdir, step)
                continue
            problem, manifest = None, None
            try:
                manifest = manifest_lib.check(folder, share)
            except Damaged as e:
                problem = str(e)
            problem = next((p for p in distributed.gather(problem) if p is not None), None)
            if problem is not None:
                damaged.append(problem)
                self._set_aside(step, problem)
                continue
            assert manifest is not None
            verified = time.perf_counter() - started
            restored = self._read(folder, state)
            self._log.write(
                "restore",
                step=step,
                position=manifest.position,
                verify_seconds=verified,
                seconds=time.perf_counter() - started,
            )
            return restored, manifest
        if damaged:
            raise UserError(
                f"none of the checkpoints in {folders.root(self._workdir)} is as it was written (the newest:"
                f" {damaged[0]}); they are in its folder `damaged`: bring back a copy of one, or choose another"
                " --workdir."
            )
        return None

    def _set_aside(self, step: int, problem: str) -> None:
        if distributed.is_main_process():
            aside = folders.set_aside(self._workdir, step)
            self._log.write("damaged", step=step, reason=problem, moved_to=str(aside))
            print(f"warning: the checkpoint of step {step} is damaged and set aside ({problem}).", file=sys.stderr)
        distributed.barrier()

    def _read(self, folder: epath.Path, state: TrainState) -> TrainState:
        try:
            return trees.read(folder, state, partial=False)
        except ValueError as e:
            if not (different := _different(trees.stored(folder), state)):
                why = filesystem.reason(e)
                raise UserError(f"{folder} cannot be read ({why}): start the same command again.") from e
            raise UserError(
                f"the checkpoint {folder} is of other networks than this config's"
                f" ({'; '.join(different[:4])}{f'; and {len(different) - 4} more' if len(different) > 4 else ''}):"
                " give the config that it was trained with, or begin another --workdir with"
                f" --config.init_from={self._workdir} --config.init_partial=True."
            ) from e

    def finish(self, last: int) -> None:
        """At the end of a run: waits, and reads the last checkpoint back.

        Raises UserError if it is not as it was written.
        """
        self.wait()
        distributed.barrier()
        started = time.perf_counter()
        try:
            manifest_lib.check(folders.root(self._workdir) / str(last), (jax.process_index(), jax.process_count()))
        except Damaged as e:
            raise UserError(f"the last checkpoint was written and cannot be read back ({e}).") from e
        self._log.write("verify", step=last, seconds=time.perf_counter() - started)

    def close(self) -> None:
        """Waits for the save under way and raises its error, if it had one."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it would raise what `wait` has told already
                self._writer.close()


def _different(there: Any, here: Any) -> list[str]:
    """How the arrays of a checkpoint differ from those of a state, by name and shape, one phrase each."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    a, b = shapes(there), shapes(here)
    return [
        f"{name}: {a.get(name, 'nothing')} there, {b.get(name, 'nothing')} here"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]
