"""Stage 2: a GPT over one sequence of text and image tokens.

Trains on token shards made by `imagegpt_jax.encode`, or on images that a frozen tokenizer encodes within the step.
"""

from imagegpt_jax.tasks import interface
from imagegpt_jax.tasks.decoder.batches import abstract_batch, batches, pack, prepare_batch
from imagegpt_jax.tasks.decoder.evaluation import evaluators, predict_fns
from imagegpt_jax.tasks.decoder.programs import PERF
from imagegpt_jax.tasks.decoder.setup import (
    Setup,
    check_mesh,
    facts,
    save_assets,
    setup,
    setup_abstract,
    setup_for_inference,
    tokenizer_params,
)
from imagegpt_jax.tasks.decoder.train_step import (
    check_frozen,
    forward_flops,
    init_state,
    load_frozen,
    step_flops,
    token_nll,
    train_step,
)

TASK = interface.Task(
    kind="decoder",
    network="decoder",
    setup=setup,
    setup_for_inference=setup_for_inference,
    setup_abstract=setup_abstract,
    init_state=init_state,
    train_step=train_step,
    batches=batches,
    check_mesh=check_mesh,
    evaluators=evaluators,
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
)

__all__ = [
    "TASK",
    "Setup",
    "abstract_batch",
    "batches",
    "check_frozen",
    "check_mesh",
    "forward_flops",
    "init_state",
    "load_frozen",
    "pack",
    "predict_fns",
    "prepare_batch",
    "save_assets",
    "setup",
    "setup_abstract",
    "setup_for_inference",
    "step_flops",
    "token_nll",
    "tokenizer_params",
    "train_step",
]
