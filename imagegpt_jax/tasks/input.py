"""The batches of a task's data, as its config asks for them, and what its first image looks like."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from imagegpt_jax.config import Config
from imagegpt_jax.data import images, pipeline, sources
from imagegpt_jax.data import ops as ops_lib
from imagegpt_jax.errors import UserError


def ops_key(split: str) -> str:
    """The key of `config.data` that has the ops of a split."""
    return "train_ops" if split == "train" else "eval_ops"


def first_shape(config: Config, split: str, source: Any) -> tuple[int, int, int] | None:
    """Height, width and channels that the ops of a split give its first image.

    None where that cannot be decoded, which is for the quarantine to tell. Raises UserError if the ops leave its pixels
    at 0 to 255.
    """
    key = ops_key(split)
    tf = ops_lib.import_tf()
    data = sources.first_record(source)["image"]
    try:
        image_HWC = ops_lib.build(ops_lib.parse(config.data[key]))(
            data, tf.constant(images.sniff(data)), tf.zeros(2, tf.int64)
        )
    except (tf.errors.OpError, ValueError):
        return None
    if image_HWC.dtype == tf.uint8:
        ops = f"{config.data[key]}|value_range(-1,1)"
        raise UserError(
            f"config.data.{key} leaves pixels at 0 to 255, and networks take -1 to 1: set --config.data.{key}='{ops}'."
        )
    return tuple(image_HWC.shape)


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
      setup: of the task, with `config` and `sources`.
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
        ops=data[ops_key(split)],
        batch_size=batch_size,
        seed=setup.config.seed,
        position=position,
        skipped=skipped,
        rows=rows,
        shuffle=train,
        epochs=None if train else 1,
        host_fn=host_fn,
    )
