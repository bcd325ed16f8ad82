"""Our side of `benchmark.py train`: times the real training step of a workload, and prints one line of JSON.

python tools/benchmarks/benchmark_jax.py --workload=decoder --size=test --seconds=1
"""

import functools
import importlib.metadata
import json
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import benchmark_floor
import benchmark_pieces
import benchmark_workloads as workloads
import numpy as np
from absl import flags

from imagegpt_jax import cli
from imagegpt_jax.runtime import malloc

WORKLOAD = flags.DEFINE_enum("workload", "decoder", workloads.WORKLOADS, "What to time.")
SIZE = flags.DEFINE_enum("size", "full", workloads.SIZES, "full, or tiny for tests.")
SECONDS = flags.DEFINE_float("seconds", 30.0, "Time steps for at least this long.", lower_bound=0.0)


def random_batch(setup: Any, config: Any) -> dict[str, np.ndarray]:
    """One batch of random codes or pictures."""
    rng = np.random.default_rng(0)
    if WORKLOAD.value == "decoder":
        codes_BN = rng.integers(0, setup.space.num_codes, (config.batch_size, setup.layout.num_codes))
        return setup.layout.pack(None, None, codes_BN)
    shape = (config.batch_size, config.res, config.res, 3)
    return {"image": rng.uniform(-1, 1, shape).astype(np.float32)}


def make_step(config: Any) -> tuple[Callable[[], float], dict[str, Any]]:
    """The step of a config on one batch, over and over: (call that returns the loss, facts)."""
    import jax

    from imagegpt_jax import train_state
    from imagegpt_jax.parallel import sharding
    from imagegpt_jax.tasks import interface
    from imagegpt_jax.training import train_metrics
    from imagegpt_jax.training.steps import Steps

    task = interface.find(config.task)
    setup = task.setup_abstract(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        make = functools.partial(task.init_state, setup)
        state, layout = train_state.init_sharded(make, setup.networks, mesh, config.seed)
        steps = Steps(task, setup, mesh, layout)
        phase = task.phase(setup, 0)
        batch = sharding.put_batch(random_batch(setup, config), mesh)
        facts = {
            "parameters": train_state.count_params(state.trainable),
            "model_flops": float(task.step_flops(setup, phase, batch)),
        }

    def call() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, totals = steps(phase, state, steps.zeros(phase, state, batch), batch)
            jax.block_until_ready(state)
        return train_metrics.fetch(totals["metrics"])["loss"]

    return call, facts


def gemm_seconds(side: int) -> list[float]:
    """Seconds of products of two square float32 matrices."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.float32) for i in range(2))
    multiply = jax.jit(jnp.matmul)

    def call() -> None:
        multiply(a, b).block_until_ready()

    return workloads.timed(call, 0.0, fewest=5)["seconds"]


def product_seconds(tokens: int, matrices: Sequence[tuple[int, int, int]]) -> list[float]:
    """Seconds of each matrix's three products with `tokens` rows: forward, and the gradients of input and matrix.

    The last in the faster of two ways: as it is written, and with x transposed before.
    """
    import jax
    import jax.numpy as jnp

    def timed(product: Callable[..., Any], *arrays: Any) -> float:
        jitted = jax.jit(product)
        times = workloads.timed(lambda: jitted(*arrays).block_until_ready(), 0.0, fewest=9)
        return statistics.median(times["seconds"])

    seconds = []
    for inputs, outputs, _ in matrices:
        shapes = (tokens, inputs), (inputs, outputs), (tokens, outputs)
        x, w, dy = (jax.random.normal(jax.random.key(i), shape, jnp.float32) for i, shape in enumerate(shapes))
        transposed = timed(lambda x, dy: jax.lax.optimization_barrier(x.T) @ dy, x, dy)
        seconds += [timed(jnp.matmul, x, w), timed(lambda dy, w: dy @ w.T, dy, w)]
        seconds.append(min(transposed, timed(lambda x, dy: x.T @ dy, x, dy)))
    return seconds


def piece_seconds(shapes: Sequence[Sequence[tuple[int, ...]]]) -> list[float]:
    """Seconds of each of `benchmark_pieces`, forward and backward in one program, on inputs of its shapes."""
    import jax
    import jax.numpy as jnp

    def both(inputs: list[jax.Array], seed: jax.Array, function: Callable[..., Any]) -> Any:
        y, back = jax.vjp(function, *inputs)
        return y, back(seed)

    seconds = []
    for function, of_inputs in zip(benchmark_pieces.pieces().values(), shapes, strict=True):
        inputs = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(of_inputs)]
        seed = jnp.ones_like(function(*inputs))
        call = functools.partial(jax.jit(both, static_argnums=2), inputs, seed, function)
        times = workloads.timed(lambda call=call: jax.block_until_ready(call()), 0.0, fewest=9)
        seconds.append(statistics.median(times["seconds"]))
    return seconds


def stream_seconds(numbers: int) -> float:
    """Seconds of adding two float32 arrays into a third."""
    import jax
    import jax.numpy as jnp

    a, b = (jnp.full(numbers, i, jnp.float32) for i in range(2))
    add = jax.jit(jnp.add)
    return statistics.median(workloads.timed(lambda: add(a, b).block_until_ready(), 0.0, fewest=9)["seconds"])


def main() -> None:
    """Times the workload that the flags name."""
    malloc.keep()
    config = workloads.make_config(WORKLOAD.value, SIZE.value)
    call, facts = make_step(config)
    gemm = gemm_seconds(workloads.GEMM_SIDE[SIZE.value])
    measured = workloads.timed(call, SECONDS.value)
    gemm += gemm_seconds(workloads.GEMM_SIDE[SIZE.value])
    if WORKLOAD.value == "decoder":
        tokens = workloads.units_per_step("decoder", config)
        measured["product_seconds"] = product_seconds(tokens, benchmark_floor.matrices(config))
        measured["piece_seconds"] = piece_seconds([shapes for shapes, _ in benchmark_pieces.shapes(config).values()])
        measured["stream_seconds"] = stream_seconds(workloads.STREAM[SIZE.value])
    losses = measured.pop("results")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "imagegpt_jax")}
    print(json.dumps({**facts, **measured, "losses": losses, "gemm_seconds": gemm, "versions": versions}))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    cli.run(main)
