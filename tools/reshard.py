"""Saves a run's state on every mesh of 1 to 8 devices and restores each onto every other: the bits must be the same.

  python tools/reshard.py --output=docs/reshard.json     # all pairs of meshes, both tasks; minutes
  python tools/reshard.py --pairs=40                     # so many of them, drawn at random

Meshes are data x fsdp x tensor on virtual CPU devices, those that the `size=test` networks can be cut over.
"""

import functools
import importlib
import itertools
import json
import os
import pathlib
import random
import sys
import tempfile
from typing import Any

from absl import flags

from imagegpt_jax import cli

PAIRS = flags.DEFINE_integer("pairs", 0, "How many pairs of each task, drawn at random; 0 = all.", lower_bound=0)
OUTPUT = flags.DEFINE_string("output", "", "File to write the counts into, as JSON.")

DEVICES = 8
TASKS = ("tokenizer", "decoder")


def meshes() -> list[tuple[int, int, int]]:
    """All (data, fsdp, tensor) of 1 to 8 devices."""
    sizes = range(1, DEVICES + 1)
    return [(a, b, c) for a, b, c in itertools.product(sizes, sizes, sizes) if a * b * c <= DEVICES]


def campaign(task_name: str, pairs: int) -> dict[str, Any]:
    """Saves and restores; counts of meshes, pairs and differences."""
    import jax
    import numpy as np

    from imagegpt_jax import checkpoint, sharding
    from imagegpt_jax import config as config_lib
    from imagegpt_jax import state as state_lib

    task = importlib.import_module(f"imagegpt_jax.tasks.{task_name}")
    root = pathlib.Path(__file__).resolve().parents[1]
    config = config_lib.sibling(str(root / "configs" / "x.py"), f"{task_name}.py").get_config("size=test")
    setup = task.setup_abstract(config)
    make = functools.partial(task.init_state, setup)
    abstract = jax.eval_shape(make, jax.eval_shape(jax.random.key, 0))
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: np.asarray(rng.standard_normal(x.shape) * 9, x.dtype), abstract)
    layouts, refused = {}, []
    for shape in meshes():
        mesh = sharding.make_mesh(
            dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), jax.devices()[: shape[0] * shape[1] * shape[2]]
        )
        try:
            task.check_mesh(setup, mesh)
        except cli.UserError as e:
            refused.append({"mesh": shape, "why": str(e)})
            continue
        with jax.set_mesh(mesh):
            layouts[shape] = (mesh, state_lib.shardings(abstract, setup.networks, mesh))
    chosen = list(itertools.product(layouts, repeat=2))
    if pairs:
        chosen = random.Random(0).sample(chosen, min(pairs, len(chosen)))
    differences = []
    with tempfile.TemporaryDirectory() as temporary:
        for a in layouts:
            targets = [b for x, b in chosen if x == a]
            if not targets:
                continue
            workdir = pathlib.Path(temporary) / "x".join(map(str, a))
            writer = checkpoint.Checkpoints(workdir, config)
            writer.save(1, jax.device_put(values, layouts[a][1]), position=0)
            writer.close()
            reader = checkpoint.Checkpoints(workdir, config)
            for b in targets:
                mesh, layout = layouts[b]
                target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
                with jax.set_mesh(mesh):
                    restored = reader.restore(target)
                assert restored is not None
                same = jax.tree.map(
                    lambda x, y, s: np.asarray(x).tobytes() == y.tobytes() and x.sharding.is_equivalent_to(s, x.ndim),
                    restored[0],
                    values,
                    layout,
                )
                if not all(jax.tree.leaves(same)):
                    differences.append([a, b])
            reader.close()
    return {"meshes": len(layouts), "pairs": len(chosen), "different": differences, "refused": len(refused)}


def main() -> None:
    """Prints the counts."""
    found = {task: campaign(task, PAIRS.value) for task in TASKS}
    for task, counts in found.items():
        print(
            f"{task}: {counts['pairs']} pairs of {counts['meshes']} meshes, {len(counts['different'])} different;"
            f" {counts['refused']} meshes cannot hold its networks"
        )
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text(json.dumps(found, indent=1) + "\n")
    if different := {task: counts["different"] for task, counts in found.items() if counts["different"]}:
        raise cli.UserError(f"restored with other bits: {different}")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    sys.exit(cli.run(main))
