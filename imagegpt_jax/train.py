"""Trains an image tokenizer (stage 1) or a decoder over text and image tokens (stage 2).

The same command again continues the run from its newest checkpoint that verifies. SIGTERM or Ctrl-C saves one and ends
with status 75, which means: start the same command again.

  python -m imagegpt_jax.train --config=configs/tokenizer.py:size=emoji --workdir=runs/tokenizer
  python -m imagegpt_jax.train --config=configs/decoder.py:size=emoji --workdir=runs/decoder \\
      --config.tokenizer=runs/tokenizer
  python -m imagegpt_jax.train --config=configs/tokenizer.py:size=vq16 --workdir=gs://bucket/vq16 \\
      --config.loss.lpips_weights=lpips_vgg16.safetensors --config.batch_size=256
"""

import sys

from absl import flags

from imagegpt_jax import cli
from imagegpt_jax.tasks import interface

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and pictures.", required=True)

ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on with the workdir's run although --config is another than it had."
)


def main() -> None:
    """Runs the training that the flags describe."""
    config = CONFIG.value
    interface.locate(config.task)

    # JAX and the rest start only once the flags are right.
    from imagegpt_jax.runtime import distributed, filesystem

    filesystem.check_client(WORKDIR.value)
    with distributed.distributed_context(preemptible=True):
        from imagegpt_jax.runtime import preemption
        from imagegpt_jax.training import loop

        preemption.current.listen()
        state = loop.run(interface.find(config.task), config, WORKDIR.value, allow_changes=ALLOW_CONFIG_CHANGE.value)
        if distributed.is_main_process():
            step = int(state.step)
            print(
                f"Stopped after step {step} of {config.steps}, saved; the same command goes on: {WORKDIR.value}"
                if preemption.current.given
                else f"Finished {config.steps} steps: {WORKDIR.value}",
                file=sys.stderr,
            )
    if preemption.current.given:
        raise SystemExit(preemption.EXIT_PREEMPTED)


if __name__ == "__main__":
    cli.run(main, joins=True, cache=True)
