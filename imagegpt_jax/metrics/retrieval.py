"""Whether generated images show what was asked for: retrieval among reference pictures by pixels, with its control.

Shapes: P prompts, S samples per prompt, H W C image, T thumbnail side.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from imagegpt_jax.data.order import Order
from imagegpt_jax.errors import UserError

SHUFFLES = 10  # the control is the mean of so many shuffles: one alone varies by as much as chance is
THUMBNAIL = 16  # side of the box-filtered pictures that are compared, in pixels
CHUNK = 256  # records read at once in the search for distinct ones


def _box_weights(size: int, target: int) -> np.ndarray:
    """[target, size]: row t averages the pixels that cell t covers, those at its edges in part."""
    edges = np.arange(target + 1) * (size / target)
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.clip(overlap, 0, None) * (target / size)


def box_downsample(images: np.ndarray, target: int = THUMBNAIL) -> np.ndarray:
    """[..., H, W, C] -> float64 [..., T, T, C] by averaging areas (a box filter)."""
    rows, columns = _box_weights(images.shape[-3], target), _box_weights(images.shape[-2], target)
    return np.einsum("th,...hwc,uw->...tuc", rows, np.asarray(images, np.float64), columns, optimize=True)


def derangement(count: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """A random permutation of range(count) that leaves no element in place (count >= 2)."""
    order = np.random.default_rng(seed).permutation(count)
    shifted = np.empty(count, np.int64)
    shifted[order] = np.roll(order, 1)  # one cycle through all elements, in random order
    return shifted


def choose_distinct(
    keys_of: Callable[[Sequence[int]], Sequence[Hashable]], size: int, count: int, seed: int
) -> np.ndarray:
    """Chooses `count` of `size` examples that show different things, in random order; reads no more than it must.

    `keys_of` numbers says what these examples show, such as their concepts or captions.

    Returns:
      int64 [min(count, number of distinct keys)], numbers of examples.
    """
    order = Order([size], seed=seed, shuffle=True)
    chosen: dict[Hashable, int] = {}
    for start in range(0, size, CHUNK):
        if len(chosen) >= count:
            break
        numbers = order(np.arange(start, min(start + CHUNK, size))).tolist()
        for number, key in zip(numbers, keys_of(numbers), strict=True):
            chosen.setdefault(key, number)
    return np.asarray(list(chosen.values())[:count], np.int64)


def retrieval(samples_PSHWC: np.ndarray, references_PHWC: np.ndarray, seed: int) -> dict[str, float]:
    """Top-1 retrieval: how often the reference nearest to a sample is that of its own prompt.

    Images are averaged down to 16 x 16 and compared by mean squared error. The control credits each
    sample to another prompt (a derangement of the prompts, the mean of ten): a model that ignores its prompt scores the
    same on both.

    Args:
      samples_PSHWC: S samples for each prompt, any value range.
      references_PHWC: one reference picture for each prompt, same value range; the resolution may differ.
      seed: of the derangements.

    Returns:
      `retrieval_top1` and `retrieval_top1_shuffled` (shares of the P x S samples), `retrieval_chance` = 1 / P.

    Raises:
      UserError: if there are fewer than two prompts.
    """
    count = len(references_PHWC)
    if count < 2:
        raise UserError(f"retrieval needs at least 2 different prompts, and the data has {count}.")
    samples = box_downsample(samples_PSHWC).reshape(count, samples_PSHWC.shape[1], -1)
    references = box_downsample(references_PHWC).reshape(count, -1)
    # |a - b|^2 expanded, so that no [P, S, P, pixels] array is made; |a|^2 does not change the order.
    distance_PSP = np.sum(np.square(references), axis=-1) - 2 * samples @ references.T
    nearest_PS = np.argmin(distance_PSP, axis=-1)
    shuffled_OP = np.stack([derangement(count, (seed, i)) for i in range(SHUFFLES)])
    return {
        "retrieval_top1": float(np.mean(nearest_PS == np.arange(count)[:, None])),
        "retrieval_top1_shuffled": float(np.mean(nearest_PS == shuffled_OP[..., None])),
        "retrieval_chance": 1.0 / count,
    }
