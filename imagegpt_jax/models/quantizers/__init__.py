"""Quantizers of the image tokenizer, all behind one call: `quantized = quantizer(z)`, then `stats = learn(..., stats)`.

Nothing mutates in a forward pass: `Quantizer` maps vectors to codes, losses and counts, and after the optimizer's step
`learn` turns the counts of the whole batch into the next statistics and, where codes do not learn by gradient, the next
codebook. `config.py` has the choices and the table of kinds, each kind is one file (`vq.py`, `ibq.py`, `fsq.py`,
`lfq.py`), `codebook.py` is what kinds with learned codes share, `quantizer.py` the module, `use.py` the statistics.
"""

from imagegpt_jax.models.quantizers.codebook import straight_through
from imagegpt_jax.models.quantizers.config import Group, Kind, QuantizerConfig
from imagegpt_jax.models.quantizers.quantizer import Quantized, Quantizer
from imagegpt_jax.models.quantizers.use import UseSums, init_stats, learn

__all__ = ["Group", "Kind", "Quantized", "Quantizer", "QuantizerConfig", "UseSums", "init_stats", "learn",
           "straight_through"]  # fmt: skip
