"""Saves a run's state on every mesh of 1 to 8 devices and restores each onto every other: the bits must be the same.

  python tools/robustness/reshard.py --output=docs/reshard.json   # all pairs of meshes, both tasks; minutes
  python tools/robustness/reshard.py --output=docs/reshard.json --minutes=3   # as many as fit; run again for the rest
  python tools/robustness/reshard.py --pairs=40                   # so many of them, drawn at random

Meshes are data x fsdp x tensor on virtual CPU devices, those that the `size=test` networks can be cut over. Every copy
on every device is compared, and the sharding that it came back with. Exits with status 1 if one differs.
"""

import itertools
import json
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from imagegpt_jax import cli, errors

PAIRS = flags.DEFINE_integer("pairs", 0, "How many pairs of each task, drawn at random; 0 = all.", lower_bound=0)
MINUTES = flags.DEFINE_float("minutes", 0.0, "Stop after so many, between two source meshes; 0 = never.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file of the counts; an existing one is continued.")

DEVICES = 8
Shape = tuple[int, int, int]


def meshes() -> list[Shape]:
    """All (data, fsdp, tensor) of 1 to 8 devices."""
    sizes = range(1, DEVICES + 1)
    return [(a, b, c) for a, b, c in itertools.product(sizes, sizes, sizes) if a * b * c <= DEVICES]


class Campaign:
    """The state of a task with random numbers in it, and where each of its arrays lies on every mesh that can hold it.

    Attributes:
      meshes: those that can, by their shape.
      refused: how many cannot.
    """

    def __init__(self, name: str):
        import jax
        import numpy as np

        from imagegpt_jax import config as config_lib
        from imagegpt_jax import train_state
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax.tasks import interface

        task = interface.find(name)
        root = pathlib.Path(__file__).resolve().parents[2]
        self._config = config_lib.sibling(str(root / "configs" / "x.py"), f"{name}.py").get_config("size=test")
        setup = task.setup_abstract(self._config)
        abstract = train_state.abstract(task.init_state, setup)
        rng = np.random.default_rng(0)
        self._values = jax.tree.map(lambda x: np.asarray(rng.standard_normal(x.shape) * 9, x.dtype), abstract)
        self._targets: dict[Shape, Any] = {}
        self.meshes: dict[Shape, Any] = {}
        self.refused = 0
        for shape in meshes():
            sizes: dict[str, int] = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
            mesh = sharding.make_mesh(sizes, jax.devices()[: shape[0] * shape[1] * shape[2]])
            try:
                task.check_mesh(setup, mesh)
            except errors.UserError:
                self.refused += 1
                continue
            with jax.set_mesh(mesh):
                layout = train_state.shardings(abstract, setup.networks, mesh)
            self.meshes[shape] = mesh
            self._targets[shape] = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout
            )

    def restore(self, source: Shape, targets: list[Shape]) -> list[Shape]:
        """Saves on one mesh, restores onto others; returns those where something differs."""
        import jax

        from imagegpt_jax import checkpoint

        different = []
        with tempfile.TemporaryDirectory() as workdir:
            checkpoints = checkpoint.Checkpoints(workdir, self._config)
            placed = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), self._values, self._targets[source])
            checkpoints.save(1, placed, position=0)
            checkpoints.wait()
            for shape in targets:
                with jax.set_mesh(self.meshes[shape]):
                    restored = checkpoints.restore(self._targets[shape])
                assert restored is not None
                same = jax.tree.map(_is_same, restored[0], self._values, self._targets[shape])
                if not all(jax.tree.leaves(same)):
                    different.append(shape)
            checkpoints.close()
        return different


def _is_same(x: Any, value: Any, target: Any) -> bool:
    """Whether an array lies as it should, with the bytes that it should have on every device."""
    import numpy as np

    parts = [np.asarray(shard.data).tobytes() == value[shard.index].tobytes() for shard in x.addressable_shards]
    return x.sharding.is_equivalent_to(target.sharding, x.ndim) and all(parts)


def run(name: str, pairs: int, results: dict[str, Any], is_over: Callable[[], bool], keep: Callable[[], None]) -> None:
    """Adds the pairs of a task to what was results: counts, pairs that differ, and the source meshes that are done.

    Args:
      name: of the task.
      pairs: how many, drawn at random; 0 = all.
      results: what an earlier call results, {} at first; changed in place.
      is_over: asked after each source mesh.
      keep: called after each source mesh.
    """
    campaign = Campaign(name)
    chosen = list(itertools.product(campaign.meshes, repeat=2))
    if pairs:
        chosen = random.Random(0).sample(chosen, min(pairs, len(chosen)))
    results |= {"meshes": len(campaign.meshes), "refused": campaign.refused, "of": len(chosen)}
    results |= {"pairs": results.get("pairs", 0), "different": results.get("different", [])}
    done = results.setdefault("sources", [])
    for source in campaign.meshes:
        targets = [b for a, b in chosen if a == source]
        if list(source) in done or not targets:
            continue
        if is_over():
            return
        results["different"] += [[source, target] for target in campaign.restore(source, targets)]
        results["pairs"] += len(targets)
        done.append(list(source))
        keep()


def main() -> None:
    """Prints the counts."""
    output = pathlib.Path(OUTPUT.value) if OUTPUT.value else None
    from imagegpt_jax.tasks import interface

    record: dict[str, dict[str, Any]] = {task: {} for task in interface.TASKS}
    if output is not None and output.exists():
        record |= json.loads(output.read_text())
    started = time.monotonic()

    def keep() -> None:
        if output is not None:
            output.write_text(json.dumps(record) + "\n")

    for task, results in record.items():
        run(task, PAIRS.value, results, lambda: 0 < MINUTES.value * 60 < time.monotonic() - started, keep)
        print(
            f"{task}: {results['pairs']} of {results['of']} pairs of {results['meshes']} meshes,"
            f" {len(results['different'])} different; {results['refused']} meshes cannot hold its networks"
        )
    if different := {task: results["different"] for task, results in record.items() if results["different"]}:
        raise errors.UserError(f"restored with other bits: {different}")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    sys.exit(cli.run(main))
