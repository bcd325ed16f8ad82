"""Damages checkpoints in every way a disk can, thousands of times, and looks what comes back from each.

  python tools/robustness/mutate.py --mutations=5000 --output=docs/mutations.json

Each time the newest of two checkpoints of a small float32 or bfloat16 state is damaged (bits flipped, files cut,
deleted, swapped, zeroed; any file, the manifest included) and restored. What comes back must be one of the two
states, to the bit, or an error in one sentence. Exits with status 1 if anything else came back.
"""

import collections
import json
import pathlib
import random
import shutil
import sys
import tempfile
from typing import Any

from absl import flags

from imagegpt_jax import cli, errors

MUTATIONS = flags.DEFINE_integer("mutations", 200, "How many checkpoints to damage.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of what is damaged and how.")
OUTPUT = flags.DEFINE_string("output", "", "File to write the counts into, as JSON.")

KINDS = ("flip", "flip many", "truncate", "delete", "swap", "zero", "zero a page", "duplicate")


def mutate(folder: pathlib.Path, kind: str, rng: random.Random) -> str:
    """Damages a file below a folder; returns which, or "" if this kind of damage changes nothing there."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    before = bytes(data)
    if kind == "delete":
        path.unlink()
        return str(path.relative_to(folder))
    if kind in ("swap", "duplicate"):
        other = rng.choice(files)
        content = other.read_bytes()
        if content == before:
            return ""
        if kind == "swap":
            other.write_bytes(before)
        path.write_bytes(content)
        return f"{path.relative_to(folder)} and {other.relative_to(folder)}"
    if not data:
        return ""
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "flip many":
        for _ in range(1 + rng.randrange(64)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[rng.randrange(len(data)) :]
    elif kind == "zero":
        data[:] = bytes(len(data))
    elif kind == "zero a page":
        start = rng.randrange(len(data)) // 4096 * 4096
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    if bytes(data) == before:
        return ""
    path.write_bytes(data)
    return str(path.relative_to(folder))


def make_state(seed: int, dtype: Any) -> Any:
    """A small TrainState of random numbers, of arrays of several sizes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from imagegpt_jax.train_state import TrainState

    rng = np.random.default_rng(seed)

    def tree() -> Any:
        shapes = {"a": (64, 48), "b": {"c": (7,), "d": (3, 5, 2)}}
        return jax.tree.map(
            lambda shape: jnp.asarray(rng.standard_normal(shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )

    return TrainState(
        step=jnp.asarray(seed, jnp.int32), trainable=tree(), frozen={}, opt=tree(), ema=tree(), stats={}, guard={}
    )


def campaign(mutations: int, seed: int) -> dict[str, Any]:
    """Damages checkpoints and restores them.

    Returns:
      counts of outcomes ("newest", "fell back", "refused", "silently wrong", "crashed") by kind of damage.
    """
    import jax
    import numpy as np
    from ml_collections import ConfigDict

    from imagegpt_jax import checkpoint

    config = ConfigDict({"checkpoint": {"every": 1, "keep": 0, "keep_every_hours": 0.0, "keep_best": ""}})
    rng = random.Random(seed)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    unexpected = []
    with tempfile.TemporaryDirectory() as temporary:
        bases, states = {}, {}
        for dtype in ("float32", "bfloat16"):
            bases[dtype] = pathlib.Path(temporary) / dtype
            states[dtype] = [make_state(step, dtype) for step in (1, 2)]
            writer = checkpoint.Checkpoints(bases[dtype], config)
            for step, state in enumerate(states[dtype], 1):
                writer.save(step, state, position=step)
            writer.close()

        def same(a: Any, b: Any) -> bool:
            return all(
                np.asarray(x).tobytes() == np.asarray(y).tobytes()
                for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
            )

        done = 0
        while done < mutations:
            dtype, kind = rng.choice(sorted(bases)), rng.choice(KINDS)
            workdir = pathlib.Path(temporary) / "damaged"
            shutil.rmtree(workdir, ignore_errors=True)
            shutil.copytree(bases[dtype], workdir)
            # Sometimes the older one is damaged too: then nothing may come back but an error.
            what = [mutate(workdir / "checkpoints" / "2", kind, rng)]
            if rng.random() < 0.1:
                what.append(mutate(workdir / "checkpoints" / "1", kind, rng))
            if not all(what):
                continue
            done += 1
            reader = checkpoint.Checkpoints(workdir, config)
            try:
                restored = reader.restore(states[dtype][0])
                if restored is None:
                    outcome = "refused"
                elif same(restored[0], states[dtype][1]):
                    outcome = "newest"
                else:
                    outcome = "fell back" if same(restored[0], states[dtype][0]) else "silently wrong"
            except errors.UserError:
                outcome = "refused"
            except Exception as e:
                outcome = "crashed"
                unexpected.append(f"{dtype} {kind} {what}: {type(e).__name__}: {e}"[:300])
            finally:
                reader.close()
            if outcome == "silently wrong":
                unexpected.append(f"{dtype} {kind} {what}")
            counts[kind][outcome] += 1
    return {"mutations": mutations, "seed": seed, "outcomes": {k: dict(v) for k, v in sorted(counts.items())}} | {
        "unexpected": unexpected
    }


def main() -> None:
    """Prints the counts."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()):  # a line for each damaged step
        report = campaign(MUTATIONS.value, SEED.value)
    for kind, outcomes in report["outcomes"].items():
        print(f"{kind:<12} " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text(json.dumps(report, indent=1) + "\n")
    if report["unexpected"]:
        print(*report["unexpected"][:20], sep="\n", file=sys.stderr)
        raise errors.UserError(f"{len(report['unexpected'])} of {report['mutations']} damaged checkpoints got through.")


if __name__ == "__main__":
    cli.run(main)
