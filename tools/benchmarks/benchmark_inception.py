"""Images per second of the FID Inception, beside torch-fidelity's, on this machine's CPU.

  python tools/benchmarks/benchmark_inception.py --output=inception.json     # needs what `make parity` installs

Each reading is a process of its own, ours and torch-fidelity's by turns, on the same random images and weights. Ours
is timed as `evaluate` runs it, with the images' hashes and the statistics of FID; theirs is the network alone, in
batches of 64, which is its default.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from imagegpt_jax import cli, errors

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "golden"))
import reference_programs

OUTPUT = flags.DEFINE_string("output", None, "Write the figures to this JSON file as well.")
IMAGES = flags.DEFINE_integer("images", 256, "Images of a reading.", lower_bound=1)
SIZE = flags.DEFINE_integer("size", 256, "Pixels of a side.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 3, "Readings of each side.", lower_bound=1)
SIDE = flags.DEFINE_enum("side", None, ["ours", "torch"], "Take one reading and print it; for the tool's own use.")
WEIGHTS = flags.DEFINE_string("weights", None, "Weights of that reading.")
_BATCH = 64


class Images:
    """Random images in memory."""

    path, in_order = "memory", False

    def __init__(self, count: int, side: int):
        self._images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)
        self.formats: dict[str, int] = {}
        self.size, self.shape, self.names = (side, side), (side, side, 3), [str(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, number: int) -> np.ndarray:
        """One image."""
        return self._images[number]


def ours(path: str, images: Images) -> float:
    """Seconds that our features and their statistics take."""
    from imagegpt_jax.metrics import feature_statistics, networks, protocols

    network = networks.load("inception", path, "tf1_bilinear")
    needs = {"moments": [("inception", "pool")]}
    protocol = protocols.find("torch_fidelity")
    feature_statistics.collect(Images(8, images.size[0]), needs, [network], protocol, batch_size=8)  # compiles
    started = time.perf_counter()
    feature_statistics.collect(images, needs, [network], protocol, batch_size=_BATCH)
    return time.perf_counter() - started


def theirs(path: str, images: Images) -> float:
    """Seconds that torch-fidelity's features take."""
    import torch

    network = reference_programs.torch_inception(reference_programs.fidelity(), pathlib.Path(path))
    with torch.no_grad():
        pixels = [torch.from_numpy(images.read(i)).permute(2, 0, 1) for i in range(len(images))]
        network(torch.stack(pixels[:8]))
        started = time.perf_counter()
        for start in range(0, len(pixels), _BATCH):
            network(torch.stack(pixels[start : start + _BATCH]))
    return time.perf_counter() - started


def main() -> None:
    """Takes the readings, and prints what they come to."""
    if SIDE.value:
        function = ours if SIDE.value == "ours" else theirs
        print(json.dumps(function(WEIGHTS.value or "", Images(IMAGES.value, SIZE.value))))
        return
    readings: dict[str, list[float]] = {"ours": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder) / "inception.pth"
        reference_programs.save_torch(reference_programs.random_inception(0), weights)
        for _ in range(REPEATS.value):
            for side, rates in readings.items():
                flags = [f"--side={side}", f"--weights={weights}", f"--images={IMAGES.value}", f"--size={SIZE.value}"]
                ran = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
                if ran.returncode:
                    raise errors.UserError(f"the reading of {side} failed: {ran.stderr.strip().splitlines()[-1]}")
                rates.append(IMAGES.value / json.loads(ran.stdout.splitlines()[-1]))
                print(f"{side:<6}{rates[-1]:8.2f} images/s", flush=True)
    medians = {side: statistics.median(rates) for side, rates in readings.items()}
    result = {
        "images": IMAGES.value,
        "size": SIZE.value,
        "images_per_second": medians,
        "ratio": medians["ours"] / medians["torch"],
        "readings": readings,
    }
    print(f"ratio {result['ratio']:.2f}")
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
