"""Stage 2: a GPT over one sequence of text and image tokens.

Trains on token shards made by `imagegpt_jax.encode`, or on images that a frozen tokenizer encodes within the step.
These are the names by which `training/loop.py`, the compiler's tools and the binaries know a stage.
"""

from imagegpt_jax.tasks.decoder.batches import abstract_batch, batches, pack, prepare_batch
from imagegpt_jax.tasks.decoder.evaluation import evaluate, predict_fns
from imagegpt_jax.tasks.decoder.setup import (
    Setup,
    check_mesh,
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
    phase,
    phases,
    step_flops,
    token_nll,
    train_step,
)

# Shown beside the progress bar.
SHOWN = ("loss", "image_bits_per_token", "unigram_image_bits_per_token")

__all__ = [
    "SHOWN",
    "Setup",
    "abstract_batch",
    "batches",
    "check_frozen",
    "check_mesh",
    "evaluate",
    "forward_flops",
    "init_state",
    "load_frozen",
    "pack",
    "phase",
    "phases",
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
