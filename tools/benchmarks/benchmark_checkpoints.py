"""Measures what verified checkpoints cost: restores with and without verification, and how long a save holds a step up.

  python tools/benchmarks/benchmark_checkpoints.py --megabytes=600 --output=checkpoints.json

A state of random float32 arrays is saved and restored, with verification and without by turns; medians are reported.
The files are in the page cache both times, so that reading, which both do, costs least: verification looks worst.
"""

import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import flags

from imagegpt_jax import cli

MEGABYTES = flags.DEFINE_integer("megabytes", 600, "Size of the state.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Restores of each kind.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", "", "File to write the numbers into, as JSON.")


def measure(megabytes: int, repeats: int) -> dict[str, Any]:
    """Seconds of restores and of the blocking part of saves."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from ml_collections import ConfigDict

    from imagegpt_jax import checkpoint
    from imagegpt_jax.checkpoint import manifest as manifest_lib
    from imagegpt_jax.train_state import TrainState

    config = ConfigDict({"checkpoint": {"every": 1, "keep": 1, "keep_every_hours": 0.0, "keep_best": ""}})
    rng = np.random.default_rng(0)
    count = max(1, megabytes // 8)
    tree = {f"layer{i}": jnp.asarray(rng.standard_normal((1000, 2000), np.float32)) for i in range(count)}
    state = TrainState(step=jnp.asarray(1), trainable={"net": tree}, frozen={}, opt={}, ema={}, stats={}, guard={})
    verify = manifest_lib.verify
    seconds: dict[str, list[float]] = {"verified": [], "not verified": []}
    with tempfile.TemporaryDirectory() as temporary:
        saver = checkpoint.Checkpoints(temporary, config)
        blocking = []
        for step in range(1, 4):
            started = time.perf_counter()
            saver.save(step, state, position=step)
            blocking.append(time.perf_counter() - started)
            saver.wait()
        size = sum(p.stat().st_size for p in pathlib.Path(temporary).rglob("*") if p.is_file())
        for turn in range(2 * (repeats + 1)):
            kind = ("verified", "not verified")[turn % 2]
            manifest_lib.verify = verify if kind == "verified" else lambda *args: None
            started = time.perf_counter()
            restored = saver.restore(state)
            assert restored is not None
            jax.block_until_ready(restored[0])
            if turn > 1:  # the first of each kind warms up
                seconds[kind].append(time.perf_counter() - started)
            del restored
        manifest_lib.verify = verify
        saver.close()
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        "megabytes": size / 1e6,
        "restore_seconds": seconds,
        "restore_seconds_median": medians,
        "verification_adds": medians["verified"] / medians["not verified"] - 1,
        "blocking_seconds": blocking,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Prints the numbers."""
    measured = measure(MEGABYTES.value, REPEATS.value)
    medians = measured["restore_seconds_median"]
    print(
        f"restore of {measured['megabytes']:.0f} MB: {medians['verified']:.3f} s verified,"
        f" {medians['not verified']:.3f} s not: verification adds {measured['verification_adds']:.1%}"
    )
    print(f"a save holds up the step for {statistics.median(measured['blocking_seconds']):.3f} s")
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
