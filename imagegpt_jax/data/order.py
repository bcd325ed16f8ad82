"""Where position p of a run falls: which source, which example. Pure index arithmetic, no state, no TensorFlow.

Shape suffixes: B positions asked for at once, M length of the mixture's period, S sources.

Position p of a source with N examples is epoch p // N and example `permute(p % N, N, keys(seed, source, epoch))`. The
permutation is a small Feistel network over a grid of at least N cells, written in NumPy: it is the one order for
images and token shards alike, needs no TensorFlow for the latter, and unlike `tf.random.experimental.index_shuffle` it
looks at every bit of its seed however small N is.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from imagegpt_jax.errors import UserError

ROUNDS = 16  # with 8, the 120 orders of five examples are visibly not equally likely
MAX_PERIOD = 10_000


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al., 2014), uint64 -> uint64: every output bit depends on every input bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=4096)
def keys(*entropy: int) -> tuple[int, ...]:
    """Hashes integers (seed, source, epoch ...) to `ROUNDS` 64-bit keys: nearby seeds give unrelated keys."""
    state = np.random.SeedSequence([e % 2**64 for e in entropy]).generate_state(ROUNDS, np.uint64)
    return tuple(int(k) for k in state)


def hash_positions(position_B: np.ndarray, *entropy: int) -> np.ndarray:
    """uint64[B]: a hash of (entropy, position), for whatever is chosen by position (a caption, an op's seed)."""
    first, second, *_ = keys(*entropy)
    with np.errstate(over="ignore"):
        return mix64(mix64(position_B.astype(np.uint64) ^ np.uint64(first)) + np.uint64(second))


def permute(index_B: np.ndarray, size: int, round_keys: Sequence[int]) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) sends each index.

    An alternating Feistel network with modular addition (Black and Rogaway, 2002, "Ciphers with arbitrary finite
    domains") over a grid of rows x columns >= size cells, whose excess (fewer than one row) is walked past.

    Args:
      index_B: integers in [0, size).
      size: number of examples, at least 1.
      round_keys: keys of the permutation, from `keys`.

    Returns:
      int64[B], distinct for distinct indices.
    """
    rows = 2 * int(np.ceil(np.sqrt(size) / 2))  # even: rotations of odd cycles alone give only even permutations
    columns = -(-size // rows)
    out_B = np.asarray(index_B, np.uint64).copy()
    outside_B = np.ones(out_B.shape, bool)
    with np.errstate(over="ignore"):
        while outside_B.any():
            row, column = np.divmod(out_B[outside_B], np.uint64(columns))
            for i in range(0, ROUNDS, 2):
                row = (row + mix64(column ^ np.uint64(round_keys[i])) % np.uint64(rows)) % np.uint64(rows)
                column = (column + mix64(row ^ np.uint64(round_keys[i + 1])) % np.uint64(columns)) % np.uint64(columns)
            out_B[outside_B] = row * np.uint64(columns) + column
            outside_B = out_B >= size
    return out_B.astype(np.int64)


def quotas(weights: Sequence[float]) -> list[int]:
    """Turns weights into whole numbers of positions per period: 0.7 and 0.3 become 7 and 3.

    Raises:
      UserError: for a weight that is not positive, or below 1 / `MAX_PERIOD` of the sum.
    """
    exact = [Fraction(w).limit_denominator(10**9) for w in weights]
    if any(w <= 0 for w in exact):
        raise UserError(f"the weights of a mixture are positive, not {', '.join(f'{w:g}' for w in weights)}.")
    share = [w / sum(exact) for w in exact]
    period = math.lcm(*(s.denominator for s in share))
    if period <= MAX_PERIOD:
        return [int(s * period) for s in share]
    if min(share) * MAX_PERIOD < 1:
        raise UserError(
            f"a source of the mixture would get {float(min(share)):.2g} of the examples: give weights of at least"
            f" {1 / MAX_PERIOD:g} of the sum, such as 0.9*A + 0.1*B."
        )
    floors = [int(s * MAX_PERIOD) for s in share]
    by_remainder = sorted(range(len(share)), key=lambda i: floors[i] - share[i] * MAX_PERIOD)
    for i in by_remainder[: MAX_PERIOD - sum(floors)]:
        floors[i] += 1
    return floors


def schedule(quota_S: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64[M]: the source of each position of one period, spread so that every prefix holds its share to within 1.

    Occurrence j of a source with weight w may sit in slots floor(j / w) to ceil((j + 1) / w) - 1; taking the earliest
    deadline first always succeeds and keeps |count - w * length| < 1 (Steiner and Yeomans, 1993).
    """
    quota_S = [int(q) for q in quota_S]
    period = sum(quota_S)
    done = [0] * len(quota_S)
    out = np.zeros(period, np.int64)
    for slot in range(period):
        ready = [i for i, q in enumerate(quota_S) if done[i] < q and done[i] * period // q <= slot]
        chosen = min(ready, key=lambda i: -(-(done[i] + 1) * period // quota_S[i]))
        out[slot] = chosen
        done[chosen] += 1
    return out


class Order:
    """Maps global positions to examples of one source or a mixture.

    Examples are numbered as if the sources were concatenated. Without shuffling, that is the order, and weights do not
    matter: an evaluation sees every example once.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, *, seed: int, shuffle: bool):
        self.sizes = [int(s) for s in sizes]
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed, self.shuffle = seed, shuffle
        quota_S = np.array(quotas(self.sizes if weights is None else weights)) if len(self.sizes) > 1 else np.array([1])
        self.source_M = schedule(quota_S)
        self.quota_S = quota_S
        self.before_M = np.zeros(len(self.source_M), np.int64)  # occurrences of the same source earlier in the period
        for i in range(len(self.sizes)):
            here = self.source_M == i
            self.before_M[here] = np.arange(here.sum())

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __call__(self, position_B: np.ndarray) -> np.ndarray:
        """int64[B] positions -> int64[B] example numbers."""
        position_B = np.asarray(position_B, np.int64)
        if not self.shuffle:
            return position_B % len(self)
        period_B, slot_B = np.divmod(position_B, len(self.source_M))
        source_B = self.source_M[slot_B]
        within_B = period_B * self.quota_S[source_B] + self.before_M[slot_B]
        out_B = np.zeros_like(position_B)
        for source in np.unique(source_B):
            size = self.sizes[source]
            epoch_B, index_B = np.divmod(within_B, size)
            for epoch in np.unique(epoch_B[source_B == source]):
                here = (source_B == source) & (epoch_B == epoch)
                shuffled = permute(index_B[here], size, keys(self.seed, int(source), int(epoch)))
                out_B[here] = self.offsets[source] + shuffled
        return out_B
