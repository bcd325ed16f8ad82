"""Stage 2: a GPT over one sequence of text and image tokens.

Trains on token shards made by `imagegpt_jax.encode`, or on images that a frozen tokenizer encodes within the step.
"""

from imagegpt_jax.tasks import interface
from imagegpt_jax.tasks.decoder.batches import abstract_batch, batches, prepare_batch
from imagegpt_jax.tasks.decoder.evaluation import evaluators
from imagegpt_jax.tasks.decoder.programs import PERF
from imagegpt_jax.tasks.decoder.setup import Setup as Setup  # a user's own task may be a variant of this one
from imagegpt_jax.tasks.decoder.setup import (
    check_mesh,
    facts,
    notes,
    save_assets,
    setup,
    setup_abstract,
    setup_for_inference,
)
from imagegpt_jax.tasks.decoder.train_step import check_frozen, init_state, load_frozen, step_flops, train_step
from imagegpt_jax.training import optimizers

TASK = interface.Task(
    kind="decoder",
    network="decoder",
    setup=setup,
    resume=setup,
    setup_for_inference=setup_for_inference,
    setup_abstract=setup_abstract,
    init_state=init_state,
    train_step=train_step,
    batches=batches,
    check_mesh=check_mesh,
    evaluators=evaluators,
    learning_rates=lambda setup, updates: {
        "learning_rate": optimizers.learning_rate(setup.config.optim, setup.config.steps, updates["train"])
    },
    progress_metrics=("loss", "image_bits_per_token", "unigram_image_bits_per_token"),
    prepare_batch=prepare_batch,
    load_frozen=load_frozen,
    check_frozen=check_frozen,
    abstract_batch=abstract_batch,
    perf=PERF,
    tokens=lambda setup, batch: batch["tokens"].size,
    step_flops=step_flops,
    save_assets=save_assets,
    assets=("text_tokenizer", "labels.json"),
    facts=facts,
    notes=notes,
)
