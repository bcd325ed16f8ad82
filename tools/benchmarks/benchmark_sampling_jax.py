"""Our lines of `tools/benchmarks/benchmark.py sample`: times the sampling engine, and prints one line of JSON.

python tools/benchmarks/benchmark_sampling_jax.py --dtype=float32 --size=test
"""

import importlib.metadata
import json
import os
from typing import Any

import benchmark_sampling as sampling
import benchmark_workloads as workloads
import numpy as np
from absl import flags

from imagegpt_jax import cli

SYSTEM = flags.DEFINE_string("system", "imagegpt_jax", "Not used: there is one.")
MODE = flags.DEFINE_enum("mode", "plain", ("plain", "int8", "speculative"), "How to decode.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of weights and computation.")
SIZE = flags.DEFINE_enum("size", "full", workloads.SIZES, "full, or tiny for tests.")
SECONDS = flags.DEFINE_float("seconds", 0.0, "Draw at least this long.", lower_bound=0.0)
WINDOW = 4  # guesses of speculative decoding: weights are random, so few are right


def make(workload: sampling.Workload, weights: str) -> tuple[Any, Any]:
    """A decoder of random numbers as decoding wants it, and its layout."""
    import jax
    import jax.numpy as jnp

    from imagegpt_jax.data.packing import Layout, TokenSpace
    from imagegpt_jax.models.gpt import GPT, GPTConfig
    from imagegpt_jax.sampling.decode_weights import prepare

    space = TokenSpace(text_vocab=0, num_classes=workload.classes, num_codes=workload.codes)
    layout = Layout(space=space, text_length=1, grid=(workload.side, workload.side))
    config = GPTConfig(
        vocab_size=space.vocab_size,
        width=workload.width,
        depth=workload.depth,
        heads=workload.heads,
        mlp_width=workload.mlp_width,
    )
    # Leaf by leaf, so that no second copy of the weights is ever held.
    leaves, treedef = jax.tree.flatten(
        jax.eval_shape(lambda key: prepare(GPT(config, key=key), weights), jax.random.key(0))
    )
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(treedef, [jnp.asarray(random_leaf(rng, x.shape, x.dtype)) for x in leaves]), layout


def random_leaf(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Numbers of about the size of trained weights."""
    if dtype == np.int8:
        return rng.integers(-127, 128, shape, np.int8)
    if len(shape) < 2:
        return np.full(shape, 1e-3 if "int8" in MODE.value else 1.0, dtype)
    return (0.02 * rng.standard_normal(shape, np.float32)).astype(dtype)


def compiled_bytes(gpt: Any, job: Any, how: Any) -> dict[str, int]:
    """What the compiler plans for the loop: weights, cache, and the peak of the whole program."""
    import jax

    from imagegpt_jax.sampling import batching, engine

    shape, settings = batching.plan(job, how)
    samples = np.arange(job.total)
    rows = batching.rows_of(job, batching.sample_keys(0, samples), samples[None])
    state = jax.eval_shape(lambda *a: engine.start(*a, shape=shape), gpt, rows, settings)
    memory: Any = engine.advance.lower(gpt, rows, settings, state, 2, shape=shape).compile().memory_analysis()
    size = {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
            for name, tree in (("weights", gpt), ("cache", state.cache))}  # fmt: skip
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "weights_bytes": size["weights"],
        "cache_bytes": size["cache"],
        "compiled_peak_bytes": peak + memory.temp_size_in_bytes,
    }


def main() -> None:
    """Times the line that the flags name."""
    import jax

    from imagegpt_jax.sampling.batching import run
    from imagegpt_jax.sampling.jobs import image_job
    from imagegpt_jax.sampling.settings import Sampling

    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    imported = sampling.resident()
    workload = sampling.WORKLOADS[SIZE.value]
    weights = "int8" if MODE.value == "int8" else DTYPE.value
    gpt, layout = make(workload, weights)
    window = WINDOW if MODE.value == "speculative" else 0
    how = Sampling(top_k=workload.top_k, cfg_scale=workload.cfg_scale, speculative=window)
    labels = np.arange(workload.images) % workload.classes
    job = image_job(layout, [(None, labels)], how)
    seeds = iter(range(10**9))

    def call() -> float:
        return float(run(gpt, job, how, next(seeds), batch_size=workload.images).forward_passes.mean())

    measured = workloads.timed(call, SECONDS.value, fewest=1, warm_up=1)
    memory = {"imports_rss_bytes": imported, "peak_rss_bytes": sampling.peak_resident()}
    facts = compiled_bytes(gpt, job, how) | {"steps": measured["results"][-1]}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "imagegpt_jax")}
    print(json.dumps({"seconds": measured["seconds"], **memory, "facts": facts, "versions": versions}))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    cli.run(main)
