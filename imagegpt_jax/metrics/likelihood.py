"""How well a decoder predicts tokens: bits per token for text and image, beside the best unigram model.

Shapes: B batch, L length, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagegpt_jax.metrics import common
from imagegpt_jax.metrics.evaluator import Evaluation

# Values of the `kind` column of a packed batch (see `data/packing.py`).
KINDS = {"text": 1, "image": 2}
# The columns of a packed batch.
COLUMNS = ("tokens", "positions", "segments", "targets", "weights", "kind", "condition", "mask")


def _measure(score: Callable[..., Any], vocab_size: int, params: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
    nll_BL, targets_BL = score(params, {name: batch[name] for name in batch if name != "mask"})
    nll_BL = nll_BL.astype(jnp.float32)
    weights_BL = jnp.where(batch["mask"][:, None], batch["weights"], 0.0)
    out: dict[str, Any] = {"loss": (jnp.sum(nll_BL * weights_BL, axis=1), jnp.sum(weights_BL, axis=1))}
    for name, kind in KINDS.items():
        scored_BL = (batch["kind"] == kind) & (weights_BL > 0)
        out[name] = (jnp.sum(jnp.where(scored_BL, nll_BL, 0.0), axis=1), jnp.sum(scored_BL, axis=1))
        out[f"{name}_counts_V"] = jnp.zeros(vocab_size, jnp.int32).at[targets_BL].add(scored_BL.astype(jnp.int32))
    return out


class LikelihoodEvaluator:
    """Scores how well a decoder predicts the tokens of a whole split."""

    def __init__(
        self,
        score: Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]],
        batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
        vocab_size: int,
        mesh: Mesh,
        columns: Sequence[str] = COLUMNS,
        *,
        prefix: str = "",
        rows: int = 0,
    ):
        """Compiles nothing yet.

        Args:
          score: pure function (params of each network, packed batch) -> (negative log-likelihood in nats, the targets
            it is of), both [B, L].
          batches: packed batches (`data/packing.py`) of this process's rows, every example once, with `mask`.
          vocab_size: number of token ids.
          mesh: devices to run on.
          columns: the columns of a batch that go to the device, if `score` reads others than a packed batch has.
          prefix: of the names of scores.
          rows: of a device at once, see `common.outputs`.
        """
        self._batches, self._vocab_size, self._mesh = batches, vocab_size, mesh
        self._columns, self._prefix, self._rows = columns, prefix, rows
        self._measure = jax.jit(functools.partial(_measure, score, vocab_size))

    def evaluate(self, params: Mapping[str, Any], step: int) -> Evaluation:
        """Scores predictions.

        Returns:
          `loss`, the weighted mean in nats that training minimises; for text and image targets that count in the loss,
          `{text,image}_bits_per_token`, the unweighted mean in bits, and its control
          `unigram_{text,image}_bits_per_token`, the entropy of the empirical distribution of those very targets (no
          unigram model does better on this data); `{text,image}_tokens`, how many were scored. A kind without targets
          has no keys.

        Raises:
          UserError: if there is nothing to score.
        """
        del step
        means = {name: common.Mean() for name in ("loss", *KINDS)}
        counts = {name: np.zeros(self._vocab_size, np.int64) for name in KINDS}
        batches = self._batches()
        for out in common.outputs(self._measure, dict(params), batches, self._columns, self._mesh, self._rows):
            for name, mean in means.items():
                total_B, weight_B = out[name]
                mean.add({name: total_B / np.maximum(weight_B, 1e-30)}, weight_B)
            for name in KINDS:
                counts[name] += out[f"{name}_counts_V"]
        scores = means["loss"].result()
        for name in KINDS:
            if counts[name].sum():
                scores[f"{name}_bits_per_token"] = means[name].result()[name] / math.log(2)
                scores[f"unigram_{name}_bits_per_token"] = common.entropy_bits(counts[name])
                scores[f"{name}_tokens"] = float(counts[name].sum())
        return Evaluation({f"{self._prefix}{name}": value for name, value in scores.items()})
