"""Statistics of features that grow by batches and do not keep the features: moments and class scores.

Everything is summed in float64. `Rows` keeps features for the metrics that need every one of them, in a file.
Shapes: N examples, D features, K classes, S splits.
"""

import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from imagegpt_jax.errors import UserError

CHUNK = 1024  # rows between which distances are taken at once
BLOCK = 256  # rows that are added to a [D, D] matrix at once: its traffic is what a few rows would cost


class Moments:
    """Mean and covariance of rows, by the pairwise update of Chan, Golub and LeVeque (1983): no large sums cancel."""

    def __init__(self, size: int):
        """Starts empty; `size` is D."""
        self._count, self._mean_D, self._scatter_DD = 0, np.zeros(size), np.zeros((size, size))
        self._waiting: list[np.ndarray] = []

    @property
    def count(self) -> int:
        """Rows so far."""
        return self._count + sum(map(len, self._waiting))

    def add(self, rows_ND: Float[np.ndarray, "N D"]) -> None:
        """Adds rows; the result does not depend on how they are cut into calls."""
        rows_ND = np.asarray(rows_ND)
        while len(rows_ND):
            room = BLOCK - (self.count - self._count)
            self._waiting.append(np.array(rows_ND[:room], np.float64))
            rows_ND = rows_ND[room:]
            if self.count - self._count == BLOCK:
                self._flush()

    @property
    def mean(self) -> Float[np.ndarray, "D"]:
        """Mean of the rows."""
        self._flush()
        return self._mean_D

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Covariance of the rows, unbiased (N - 1); raises UserError if there are fewer than two rows."""
        self._flush()
        if self._count < 2:
            raise UserError(f"a covariance needs at least 2 images, and there {'is 1' if self._count else 'are none'}.")
        return self._scatter_DD / (self._count - 1)

    def _flush(self) -> None:
        if self._waiting:
            rows_ND = np.concatenate(self._waiting)
            self._waiting = []
            mean_D = rows_ND.mean(axis=0)
            rows_ND -= mean_D
            count, total = len(rows_ND), self._count + len(rows_ND)
            step_D = mean_D - self._mean_D
            self._scatter_DD += rows_ND.T @ rows_ND
            if self._count:
                self._scatter_DD += np.outer(step_D * (self._count * count / total), step_D)
            self._mean_D = self._mean_D + step_D * (count / total)
            self._count = total


class ClassScores:
    """What the Inception Score is made of (Salimans et al. 2016, arXiv:1606.03498), for each split."""

    def __init__(self, splits: int, classes: int):
        """Starts empty; `splits` is S, `classes` is K."""
        self.counts_S = np.zeros(splits, np.int64)
        self._sums_SK = np.zeros((splits, classes))
        self._negative_entropy_S = np.zeros(splits)

    def add(self, logits_NK: Float[np.ndarray, "N K"], splits_N: Int[np.ndarray, "N"]) -> None:
        """Adds logits, each to its split."""
        logits_NK = np.asarray(logits_NK, np.float64)
        logits_NK = logits_NK - logits_NK.max(axis=1, keepdims=True)
        log_p_NK = logits_NK - np.log(np.exp(logits_NK).sum(axis=1, keepdims=True))
        p_NK = np.exp(log_p_NK)
        np.add.at(self.counts_S, splits_N, 1)
        np.add.at(self._sums_SK, splits_N, p_NK)
        np.add.at(self._negative_entropy_S, splits_N, (p_NK * log_p_NK).sum(axis=1))

    @property
    def scores(self) -> Float[np.ndarray, "S"]:
        """exp(mean KL(p(class | image), p(class))) of each split that is not empty."""
        used = self.counts_S > 0
        count_S = self.counts_S[used]
        mean_SK = self._sums_SK[used] / count_S[:, None]
        log_SK = np.log(mean_SK, out=np.zeros_like(mean_SK), where=mean_SK > 0)
        return np.exp(self._negative_entropy_S[used] / count_S - (mean_SK * log_SK).sum(axis=1))


def splits_by_number(count: int, splits: int, shuffle_seed: int | None) -> Int[np.ndarray, "N"]:
    """The split of each of `count` examples in `splits` splits, equal but for one example.

    They are dealt out after `RandomState(shuffle_seed).permutation`; None keeps their order.
    """
    split_N = np.searchsorted(np.arange(1, splits + 1) * count // splits, np.arange(count), side="right")
    if shuffle_seed is None:
        return split_N
    dealt_N = np.empty(count, np.int64)
    dealt_N[np.random.RandomState(shuffle_seed).permutation(count)] = split_N
    return dealt_N


def unit(rows_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows scaled to unit length, in float64."""
    rows_ND = np.asarray(rows_ND, np.float64)
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


class Rows:
    """Rows of float32 in a temporary file: every one can be read again, and none stays in memory."""

    def __init__(self, size: int):
        """Starts empty; `size` is D."""
        self._file = tempfile.TemporaryFile(prefix="imagegpt_jax_features_")  # noqa: SIM115 - lives as long as this
        self._count, self.size = 0, size

    def __len__(self) -> int:
        return self._count

    def add(self, rows_ND: Float[np.ndarray, "N D"]) -> None:
        """Appends rows."""
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(rows_ND, np.float32).tobytes())
        self._count += len(rows_ND)

    def block(self, start: int, stop: int) -> Float[np.ndarray, "n D"]:
        """Rows from `start` up to `stop`."""
        stop = min(stop, self._count)
        self._file.seek(start * self.size * 4)
        data = self._file.read((stop - start) * self.size * 4)
        return np.frombuffer(data, np.float32).reshape(-1, self.size)

    def chunks(self) -> Iterator[tuple[int, Float[np.ndarray, "n D"]]]:
        """All rows, `CHUNK` by `CHUNK`, each time with the number of the first."""
        return ((start, self.block(start, start + CHUNK)) for start in range(0, self._count, CHUNK))

    def take(self, numbers: Sequence[int] | Int[np.ndarray, "n"]) -> Float[np.ndarray, "n D"]:
        """The rows with these numbers."""
        rows = [self.block(number, number + 1) for number in np.asarray(numbers).tolist()]
        return np.concatenate(rows) if rows else np.empty((0, self.size), np.float32)

    def close(self) -> None:
        """Frees the file."""
        self._file.close()
