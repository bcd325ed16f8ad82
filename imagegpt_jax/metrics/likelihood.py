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

# Values of the `kind` column of a packed batch (see `data/packing.py`).
KINDS = {"text": 1, "image": 2}
# The columns of a packed batch.
COLUMNS = ("tokens", "positions", "segments", "targets", "weights", "kind", "condition", "mask")


@functools.partial(jax.jit, static_argnums=(0, 1))
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


def evaluate(
    score: Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]],
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    vocab_size: int,
    mesh: Mesh,
    columns: Sequence[str] = COLUMNS,
) -> dict[str, float]:
    """Scores the predictions of a whole split.

    Args:
      score: pure function (params, packed batch) -> (negative log-likelihood in nats, the targets it is of), both
        [B, L]. Give the same function object every time: the compiled program is kept with it.
      params: its first argument.
      batches: packed batches (`data/packing.py`) of this process's rows, every example once, with `mask`.
      vocab_size: number of token ids.
      mesh: devices to run on.
      columns: the columns of a batch that go to the device, if `score` reads others than a packed batch has.

    Returns:
      `loss`, the weighted mean in nats that training minimises; for text and image targets that count in the loss,
      `{text,image}_bits_per_token`, the unweighted mean in bits, and its control `unigram_{text,image}_bits_per_token`,
      the entropy of the empirical distribution of those very targets (no unigram model does better on this data);
      `{text,image}_tokens`, how many were scored. A kind without targets has no keys.

    Raises:
      UserError: if there is nothing to score.
    """
    means = {name: common.Mean() for name in ("loss", *KINDS)}
    counts = {name: np.zeros(vocab_size, np.int64) for name in KINDS}
    for out in common.outputs(functools.partial(_measure, score, vocab_size), params, batches, columns, mesh):
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
    return scores
