"""Peak memory of the import of a large checkpoint.

  python tools/benchmarks/import_memory.py --size=3B --output=runs/import

Writes a LlamaGen decoder of random numbers at full size under the names of its checkpoints, an array at a time, then
reads it in a process of its own and prints the most memory that process ever held, as a multiple of the file. The
figures kept in docs/import_memory.json were made so.
"""

import json
import pathlib
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
from absl import flags

from imagegpt_jax import cli
from imagegpt_jax.convert import core, llamagen, networks
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.weight_files import safetensors_file
from imagegpt_jax.weight_files.tensor import Tensor

SIZES = {"B": (12, 12, 768, 2048), "XXL": (48, 24, 1536, 4096), "3B": (24, 32, 3200, 8704)}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SIZE = flags.DEFINE_enum("size", "3B", list(SIZES), "LlamaGen's size.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of the file.")
OUTPUT = flags.DEFINE_string("output", "runs/import", "Folder for the file (its size is printed) and the result.")
KEEP = flags.DEFINE_bool("keep", False, "Whether to leave the file.")

_LOAD = """
import resource, sys, time
import imagegpt_jax as ig
start = time.time()
gpt = ig.load_decoder(sys.argv[1])
import jax
jax.block_until_ready(jax.tree.leaves(gpt.gpt))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.time() - start)
"""
_CONVERT = """
import pathlib, resource, sys, time
from imagegpt_jax.inference import export
start = time.time()
export.convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]).parent / "portable")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.time() - start)
"""


def write(path: pathlib.Path, size: str, dtype: np.dtype) -> int:
    """Writes a checkpoint of random numbers; returns the number of parameters."""
    depth, heads, width, mlp = SIZES[size]
    config = GPTConfig(
        vocab_size=16384 + 1001, head_size=16384, width=width, depth=depth, heads=heads, mlp_width=mlp,
        rotary_dims=(0, width // heads // 2, width // heads // 2), rope_zero_prefix=True,
    )  # fmt: skip
    ours = networks.shapes(networks.network(config))
    tensors = {
        name: Tensor(shape, dtype, lambda name=name, shape=shape: _random(name, shape, dtype))
        for name, shape in ours.items()
    }
    jobs = core.plan(core.invert(llamagen.table(config)), tensors, None, "random weights")
    shapes = {name: (_their_shape(name, depth, width, mlp), dtype) for job in jobs for name in job.targets}
    safetensors_file.write(path, shapes, (pair for job in jobs for pair in job.run(tensors)), {})
    return sum(int(np.prod(shape)) for shape in ours.values())


def _their_shape(name: str, depth: int, width: int, mlp: int) -> tuple[int, ...]:
    endings = {
        r"(tok_embeddings|output)\.weight": (16384, width),
        r"cls_embedding.*": (1001, width),
        r".*wqkv\.weight": (3 * width, width),
        r".*wo\.weight": (width, width),
        r".*w[13]\.weight": (mlp, width),
        r".*w2\.weight": (width, mlp),
        r".*norm\.weight": (width,),
    }
    return next(shape for ending, shape in endings.items() if re.fullmatch(ending, name))


def _random(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    values = np.random.default_rng(abs(hash(name)) % 2**32).standard_normal(shape, np.float32)
    return (0.02 * values).astype(dtype)


def measure(program: str, path: pathlib.Path) -> tuple[int, float]:
    """(peak bytes of resident memory, seconds) of a process of its own."""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    peak, seconds = done.stdout.split()
    return int(peak), float(seconds)


def main() -> None:
    """Writes, reads, prints."""
    folder = pathlib.Path(OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    parameters = write(path, SIZE.value, DTYPES[DTYPE.value])
    size = path.stat().st_size
    result = {"size": SIZE.value, "dtype": DTYPE.value, "parameters": parameters, "file_bytes": size}
    for name, program in (("load_decoder", _LOAD), ("convert", _CONVERT)):
        peak, seconds = measure(program, path)
        result[name] = {"peak_bytes": peak, "ratio": round(peak / size, 3), "seconds": round(seconds, 1)}
    result["jax"] = jax.__version__
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if not KEEP.value:
        path.unlink()
        for part in (folder / "portable").iterdir():
            part.unlink()
        (folder / "portable").rmdir()


if __name__ == "__main__":
    cli.run(main)
