"""Features of image sets, in batches of a fixed number of rows, by one process or by many together.

Batch k holds the same images however many are read at once and however many processes there are, and every process sees
the features of all batches in the order of the images: what is summed from them is the same to the last bit.
Shapes: N images, H W pixels, B rows of a batch.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from imagegpt_jax.metrics.sets import ImageSet
from imagegpt_jax.parallel import padding, sharding

ROWS = 8  # of a device at once, always
_READERS = 8


@dataclasses.dataclass(frozen=True)
class Network:
    """A frozen network that turns images into features.

    Attributes:
      name: such as "inception".
      about: where its weights are from: path and SHA-256.
      prepare: uint8 [H, W, 3] -> what it takes, on the host.
      apply: pure function (params, prepared [B, ...]) -> {output: array [B, ...]}. Equal ones are compiled once.
      params: its first argument.
      size: pixels of a side that `prepare` resizes to; 0 where the network takes any.
    """

    name: str
    about: Mapping[str, str]
    prepare: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[Any, jax.Array], Mapping[str, jax.Array]]
    params: Any
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """Features of some images, which follow those of the part before."""

    start: int  # number of the first image
    digests: np.ndarray  # uint8 [N, 32], SHA-256 of each image's pixels
    features: Mapping[tuple[str, str], np.ndarray]  # (network, output) -> float32 [N, ...]


def digest(image_HWC: np.ndarray) -> np.ndarray:
    """SHA-256 of an image's shape and pixels, uint8 [32]."""
    pixels = np.ascontiguousarray(image_HWC)
    return np.frombuffer(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest(), np.uint8)


def _prefetch(images: ImageSet, numbers: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Images by number, `batch_size` of them prefetched."""
    with (
        concurrent.futures.ThreadPoolExecutor(1) as ahead,
        concurrent.futures.ThreadPoolExecutor(1 if images.in_order else _READERS) as readers,
    ):

        def load(start: int) -> list[np.ndarray]:
            return list(readers.map(images.read, numbers[start : start + batch_size]))

        waiting = ahead.submit(load, 0)
        for start in range(0, len(numbers), batch_size):
            loaded = waiting.result()
            waiting = ahead.submit(load, start + batch_size)
            yield from loaded


def extract(
    images: ImageSet,
    networks: Sequence[Network],
    outputs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    advance: Callable[[int], Any] = lambda count: None,
) -> Iterator[Part]:
    """Computes the `outputs`, (network, output), of all images, and yields them in parts; every process all of them.

    No result depends on `batch_size`, the images that a process reads at once; `advance` is called with how many have
    been done since the last call.

    Raises:
      UserError: if an image is damaged.
    """
    # Virtual devices of one CPU would only share it.
    mesh = sharding.local_mesh(jax.local_devices()[:1] if jax.default_backend() == "cpu" else None)
    # By way of the host: what was read under a mesh of all processes' devices is on all of these.
    held = {network.name: jax.tree.map(np.asarray, network.params) for network in networks}
    params = jax.device_put(held, sharding.replicated(mesh))
    rows, count = ROWS * mesh.size, len(images)
    turn = rows * jax.process_count()
    mine = [number for number in range(count) if number // rows % jax.process_count() == jax.process_index()]
    source = _prefetch(images, mine, batch_size)

    def dispatch(start: int) -> tuple[np.ndarray, dict[tuple[str, str], jax.Array]]:
        first = start + jax.process_index() * rows
        batch = [next(source) for _ in range(max(0, min(rows, count - first)))]
        digests = np.zeros((rows, 32), np.uint8)
        digests[: len(batch)] = np.reshape([digest(image) for image in batch], (-1, 32))
        computed = {}
        for network in networks:
            prepared = [network.prepare(image) for image in batch or [np.zeros(images.shape, np.uint8)]]
            with jax.set_mesh(mesh):  # the caller may be at work on a mesh of all processes' devices
                placed = jax.device_put(padding.pad(np.stack(prepared), rows), sharding.batch_sharding(mesh))
                of_network = _run(network.apply, params[network.name], placed)
            computed |= {key: value for o, value in of_network.items() if (key := (network.name, o)) in outputs}
        return digests, computed

    running = None
    for start in [*range(0, count, turn), None]:
        dispatched = None if start is None else (start, *dispatch(start))
        if running is not None:
            part = _gathered(*running, count)
            advance(len(part.digests))
            yield part
        running = dispatched


@functools.partial(jax.jit, static_argnums=0)
def _run(apply: Callable[..., Any], params: Any, rows: jax.Array) -> Mapping[str, jax.Array]:
    return apply(params, rows)


def _gathered(start: int, digests: np.ndarray, computed: Mapping[tuple[str, str], jax.Array], count: int) -> Part:
    """The batches of all processes, one after another, without what fills the last one up."""
    arrays = {name: np.asarray(value, np.float32) for name, value in computed.items()}
    if jax.process_count() > 1:
        every = multihost_utils.process_allgather((digests, *arrays.values()))
        digests, *values = (np.asarray(value).reshape(-1, *value.shape[2:]) for value in every)
        arrays = dict(zip(arrays, values, strict=True))
    stop = min(len(digests), count - start)
    return Part(start, digests[:stop], {name: value[:stop] for name, value in arrays.items()})
