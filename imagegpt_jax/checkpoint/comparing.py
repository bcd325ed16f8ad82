"""What differs between two checkpoints of a run."""

import time
from typing import Any

from etils import epath

from imagegpt_jax import config as config_lib
from imagegpt_jax.checkpoint import folders
from imagegpt_jax.checkpoint import manifest as manifest_lib


def compare(workdir: epath.PathLike, a: int, b: int) -> list[str]:
    """Lines that tell what differs from step `a` to step `b`: manifest, config, and how far each parameter moved.

    The distance of a parameter is |x_b - x_a| / |x_a|, Frobenius norms. Raises Damaged if a step does not verify.
    """
    first, second = (manifest_lib.check(folders.root(workdir) / str(step)) for step in (a, b))
    lines = [f"step: {a} -> {b}", f"position: {first.position} -> {second.position}"]
    lines.append(f"saved: {' -> '.join(time.strftime('%F %T', time.localtime(m.time)) for m in (first, second))}")
    if first.skipped != second.skipped:
        lines.append(f"skipped positions: {list(first.skipped)} -> {list(second.skipped)}")
    for title, one, other in (
        ("config", first.config, second.config),
        ("versions", first.versions, second.versions),
        ("scores", first.metrics, second.metrics),
    ):
        one, other = config_lib.flatten(one), config_lib.flatten(other)
        changed = [k for k in sorted(one.keys() | other.keys()) if one.get(k, ...) != other.get(k, ...)]
        lines += [f"{title}: {k}: {one.get(k, '(absent)')} -> {other.get(k, '(absent)')}" for k in changed]
    return lines + [f"parameters: {line}" for line in _moved(workdir, a, b)]


def _moved(workdir: epath.PathLike, a: int, b: int) -> list[str]:
    import numpy as np

    from imagegpt_jax.train_state import flatten

    old, new = (flatten(_trainable(workdir, step)) for step in (a, b))
    lines = [f"{name}: only in step {a if name in old else b}" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        x, y = (np.asarray(tree[name], np.float64) for tree in (old, new))
        if x.shape != y.shape:
            lines.append(f"{name}: {x.shape} -> {y.shape}")
        elif (moved := np.linalg.norm(y - x)) > 0:
            lines.append(f"{name}: {moved / max(np.linalg.norm(x), 1e-30):.3g}")
    return lines or ["equal"]


def _trainable(workdir: epath.PathLike, step: int) -> Any:
    from imagegpt_jax.checkpoint import trees

    folder = folders.root(workdir) / str(step)
    return trees.read(folder, {"trainable": trees.stored(folder)["trainable"]}, on_host=True)["trainable"]
