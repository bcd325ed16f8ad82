"""Trains an image tokenizer (stage 1) or a decoder over text and image tokens (stage 2).

The same command again continues the run from its newest checkpoint.

  python -m imagegpt_jax.train --config=configs/tokenizer.py:size=emoji --workdir=runs/tokenizer
  python -m imagegpt_jax.train --config=configs/decoder.py:size=emoji --workdir=runs/decoder \\
      --config.tokenizer=runs/tokenizer
  python -m imagegpt_jax.train --config=configs/tokenizer.py:size=vq16 --workdir=gs://bucket/vq16 \\
      --config.data.train=tfds:imagenet2012,split=train --config.batch_size=256
"""

import importlib
import sys

from absl import flags

from imagegpt_jax import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and pictures.", required=True)

TASKS = ("tokenizer", "decoder")


def main() -> None:
    """Runs the training that the flags describe."""
    config = CONFIG.value
    if config.task not in TASKS:
        raise cli.UserError(f"config.task={config.task!r} is no task.{cli.suggest(config.task, TASKS)}")

    # JAX and the rest start only once the flags are right.
    from imagegpt_jax import distributed, storage

    storage.check(config.to_dict(), workdir=WORKDIR.value)
    with distributed.together():
        from imagegpt_jax import loop

        loop.run(importlib.import_module(f"imagegpt_jax.tasks.{config.task}"), config, WORKDIR.value)
        if distributed.is_first():
            print(f"Finished {config.steps} steps: {WORKDIR.value}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
