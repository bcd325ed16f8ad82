"""The batches of a stage's data, as its config asks for them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from imagegpt_jax.data import pipeline


def batches(
    setup: Any,
    split: str,
    *,
    batch_size: int,
    position: int = 0,
    rows: np.ndarray | None = None,
    skipped: Sequence[tuple[int, int]] = (),
    host_fn: Callable[[pipeline.Batch], Any] | None = None,
) -> Any:
    """The batches of a split: shuffled, augmented and endless for "train", once and in order otherwise.

    Args:
      setup: of the stage, with `config` and `sources`.
      split: "train" or "validation".
      batch_size: global rows of a batch.
      position: where in the data to begin.
      rows: the rows of a batch that this process loads; None = all.
      skipped: windows of positions that are left out.
      host_fn: see `pipeline.Batches`.
    """
    data = setup.config.data
    train = split == "train"
    return pipeline.Batches(
        setup.sources[split],
        ops=data.train_ops if train else data.eval_ops,
        batch_size=batch_size,
        seed=setup.config.seed,
        position=position,
        skipped=skipped,
        rows=rows,
        shuffle=train,
        epochs=None if train else 1,
        host_fn=host_fn,
    )
