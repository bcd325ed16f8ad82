"""Measures the input pipeline beside a loop that only decodes the same JPEGs from memory.

Makes a set of JPEGs (textures of 256 to 400 px, quality 90), packs it into ArrayRecord shards in a temporary folder,
and runs, turn by turn in one process after a warm-up:

    pipeline      everything that training does: order, reading records, captions, decode, ops, batches of NumPy arrays
    same_ops      tf.data over the encoded bytes in memory, in order, with the same ops and parallelism; not batched
    decode_only   the same with nothing but JPEG decoding of whole images

and prints the median images per second of each, the processor time that each takes for an image, and the median over
the turns of the pipeline's ratio to the others. What the pipeline had prepared before its turn is drawn before the
clock starts, and it has filled its buffers again before the next loop's turn. Beside other busy programs the loop with
more threads gets more of the processors: then only the processor times compare.

    python tools/benchmarks/benchmark_data.py --output=benchmark_data.json
"""

import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from PIL import Image

from imagegpt_jax import cli, errors

NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Images in the set that is made.", lower_bound=16)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per batch of the pipeline.", lower_bound=1)
OPS = flags.DEFINE_string(
    "ops", "decode|random_resized_crop(256)|flip_lr|value_range(-1,1)", "Op string of both loops."
)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each loop; the median is reported.", lower_bound=1)
IMAGES_PER_ROUND = flags.DEFINE_integer("images_per_round", 1024, "Images in one turn of a loop.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Write the figures to this JSON file as well.")


def texture(rng: np.random.Generator) -> bytes:
    """A JPEG of smooth colour fields with some grain, 256 to 400 px a side: compresses like a photograph."""
    height, width = (int(v) for v in rng.integers(256, 401, 2))
    image_HWC = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((4, 90.0), (16, 40.0), (64, 25.0)):
        coarse = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        channels = [
            Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC) for c in coarse.transpose(2, 0, 1)
        ]
        image_HWC += weight * np.stack([np.asarray(c) for c in channels], axis=-1)
    image_HWC += 4.0 * rng.standard_normal(image_HWC.shape, np.float32)
    out = io.BytesIO()
    Image.fromarray(np.clip(image_HWC + 128, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def make_set(folder: str, num_images: int) -> list[bytes]:
    """Writes the packed set and returns its JPEGs."""
    from imagegpt_jax.data.shards import ShardWriter, shard_ranges

    rng = np.random.default_rng(0)
    jpegs = [texture(rng) for _ in range(num_images)]
    writer = ShardWriter(folder, "train", shard_ranges(num_images, 256), kind="images", made_from="benchmark")
    for shard, (start, stop) in enumerate(writer.ranges):
        writer.write(
            shard, ({"id": str(i), "image": jpegs[i], "captions": [f"texture {i}"]} for i in range(start, stop))
        )
    writer.finish()
    return jpegs


def in_memory(jpegs: list[bytes], ops: str) -> Callable[[int], None]:
    """A loop over the JPEGs in memory that ends inside TensorFlow: no Python per image, no batching, no copies."""
    from imagegpt_jax.data import ops as ops_lib

    tf = ops_lib.import_tf()
    process = ops_lib.build(ops_lib.parse(ops))
    seeds = np.stack([np.arange(len(jpegs)), np.zeros(len(jpegs), np.int64)], axis=1)
    dataset = tf.data.Dataset.from_tensor_slices((jpegs, seeds)).repeat()
    dataset = dataset.map(
        lambda data, seed: process(data, tf.constant(0), seed), num_parallel_calls=os.cpu_count(), deterministic=True
    )
    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = dataset.prefetch(64).with_options(options)
    # reduce compiles anew for every count, so that count is an argument of one function
    run = tf.function(lambda n: dataset.take(n).reduce(np.int64(0), lambda count, image: count + 1))
    return lambda count: int(run(tf.constant(count, tf.int64)))  # type: ignore[return-value]


def pipeline(folder: str, ops: str, batch_size: int) -> Callable[[int], None]:
    """A loop over our batches."""
    from imagegpt_jax.data.pipeline import Batches
    from imagegpt_jax.data.sources import open_source

    batches: Iterator[Any] = Batches(open_source(f"array_record:{folder}"), ops=ops, batch_size=batch_size)

    def run(count: int) -> None:
        for _ in range(count // batch_size):
            next(batches)

    return run


def settle() -> None:
    """Waits until the threads that read ahead have nothing more to do."""
    used = -1.0
    while time.process_time() - used > 0.02:
        used = time.process_time()
        time.sleep(0.3)


def main() -> None:
    """Runs the benchmark."""
    if IMAGES_PER_ROUND.value % BATCH_SIZE.value:
        raise errors.UserError(
            f"--images_per_round={IMAGES_PER_ROUND.value} should be a multiple of --batch_size={BATCH_SIZE.value}."
        )
    with tempfile.TemporaryDirectory() as folder:
        jpegs = make_set(folder, NUM_IMAGES.value)
        loops = {
            "pipeline": pipeline(folder, OPS.value, BATCH_SIZE.value),
            "same_ops": in_memory(jpegs, OPS.value),
            "decode_only": in_memory(jpegs, "decode"),
        }
        rates: dict[str, list[float]] = {name: [] for name in loops}
        milliseconds: dict[str, list[float]] = {name: [] for name in loops}
        for loop in loops.values():
            loop(IMAGES_PER_ROUND.value)
        for _ in range(ROUNDS.value):
            for name, loop in loops.items():
                settle()
                if name == "pipeline":
                    loop(8 * BATCH_SIZE.value)  # more than it keeps ready
                begin, used = time.perf_counter(), time.process_time()
                loop(IMAGES_PER_ROUND.value)
                rates[name].append(IMAGES_PER_ROUND.value / (time.perf_counter() - begin))
                milliseconds[name].append(1e3 * (time.process_time() - used) / IMAGES_PER_ROUND.value)
    median = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(
            f"{name:12} {median[name]:8.1f} images/s   (from {min(values):.1f} to {max(values):.1f}),"
            f" {statistics.median(milliseconds[name]):.3f} ms of processor time an image"
        )
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates["pipeline"], rates[name], strict=True))
        for name in ("same_ops", "decode_only")
    }
    print(f"pipeline / same_ops {ratios['same_ops']:.3f}, pipeline / decode_only {ratios['decode_only']:.3f}")
    if OUTPUT.value:
        figures = {
            "images_per_second": median,
            "processor_ms_per_image": {name: statistics.median(values) for name, values in milliseconds.items()},
            "ratio": ratios,
            "ops": OPS.value,
            "num_images": len(jpegs),
            "mean_jpeg_bytes": statistics.mean(map(len, jpegs)),
            "batch_size": BATCH_SIZE.value,
            "cpus": os.cpu_count(),
            "machine": platform.processor() or platform.machine(),
        }
        epath.Path(OUTPUT.value).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
