"""Quantizers of the image tokenizer, all behind one call: `quantized = quantizer(z)`, then `stats = learn(..., stats)`.

Nothing mutates in a forward pass: `Quantizer` maps vectors to codes, losses and counts, and after the optimizer's step
`learn` turns the counts of the whole batch into the next statistics and, where codes do not learn by gradient, the next
codebook. `config.py` has the choices and the table of kinds, each kind is one file (`vq.py`, `ibq.py`, `fsq.py`,
`lfq.py`), `codebook.py` is what kinds with learned codes share, `quantizer.py` the module, `use.py` the statistics.
"""

from imagegpt_jax.models.quantizers.codebook import entropy_loss, l2_normalize, nearest_codes, straight_through
from imagegpt_jax.models.quantizers.config import Group, Kind, QuantizerConfig
from imagegpt_jax.models.quantizers.quantizer import Quantized, Quantizer
from imagegpt_jax.models.quantizers.use import (
    QuantizerStats,
    UseSums,
    average_codebook,
    init_stats,
    learn,
    revive,
    update_stats,
)

__all__ = [
    "Group",
    "Kind",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerStats",
    "UseSums",
    "average_codebook",
    "entropy_loss",
    "init_stats",
    "l2_normalize",
    "learn",
    "nearest_codes",
    "revive",
    "straight_through",
    "update_stats",
]
