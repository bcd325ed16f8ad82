"""How tokens are drawn: the settings that a person chooses, checked, and the schedules of guidance. NumPy only.

Shapes: N tokens to decode.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from imagegpt_jax.config import to_dataclass
from imagegpt_jax.errors import UserError, above, at_least, check_ranges, suggest
from imagegpt_jax.plugins import resolve
from imagegpt_jax.sampling import guidance

UNKNOWN = -1  # a token that is to be sampled, where others are known
WEIGHTS = ("", "float32", "bfloat16", "int8")
# Settings as they were called before: in the metadata of pictures, the configs of workdirs and flags.
RENAMED = {"together": "tokens_per_step", "no_repeat": "no_repeat_ngram_size"}

RANGES = {
    "temperature": at_least(0),
    "cfg_scale": at_least(0),
    "top_k": at_least(0, "0 keeps all tokens", whole=True),
    "no_repeat_ngram_size": at_least(0, "0 allows repetition", whole=True),
    "top_p": above(0, "1 keeps all tokens", at_most=1),
    "min_p": at_least(0, "0 keeps all tokens", at_most=1),
    "cfg_power": above(0),
    "tokens_per_step": at_least(1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Filters apply in the order temperature, top_k, top_p, min_p.

    Attributes:
      temperature: divides the logits; 0 takes the largest.
      top_k: keep the k most likely tokens; 0 = all.
      top_p: then keep the fewest most likely tokens whose probabilities sum to at least p (arXiv:1904.09751).
      min_p: then keep the tokens at least this share as likely as the likeliest (arXiv:2407.01082); 0 = all.
      no_repeat_ngram_size: no n-gram of this many tokens appears twice in what is sampled; 1 = every token at
        most once, 0 = off.
      cfg_scale: classifier-free guidance, logits = none + scale (prompt - none) (arXiv:2207.12598); 1 = off.
      cfg_schedule: how the scale changes from token to token: constant, interval, linear, cosine or power_cosine, or
        module:name of your own (`sampling/guidance.py`).
      cfg_power: exponent of "power_cosine" (arXiv:2411.00776).
      cfg_start: first share of the tokens at which "interval" guides (arXiv:2404.07724).
      cfg_end: share of the tokens at which "interval" ends.
      weights: precision of the weights while decoding: "float32", "bfloat16" or "int8" (matrices of blocks only, a
        scale for each column); "" = the decoder's own.
      speculative: window of speculative Jacobi decoding: so many guesses go through the network at once, and what is
        drawn has the same distribution (`sampling/speculative.py`); 0 = off.
      tokens_per_step: codes that one forward pass samples, for decoders trained in random order
        (`sampling/parallel.py`).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    no_repeat_ngram_size: int = 0
    cfg_scale: float = 1.0
    cfg_schedule: str = "constant"
    cfg_power: float = 1.0
    cfg_start: float = 0.0
    cfg_end: float = 1.0
    weights: str = ""
    speculative: int = 0
    tokens_per_step: int = 1

    def __post_init__(self):
        check_ranges(self, RANGES)
        resolve(self.cfg_schedule, "cfg_schedule", guidance.SCHEDULES)
        if not 0 <= self.cfg_start <= self.cfg_end <= 1:
            raise UserError(f"cfg_start={self.cfg_start} and cfg_end={self.cfg_end} must rise within 0 to 1.")
        if self.weights not in WEIGHTS:
            raise UserError(f"unknown weights {self.weights!r}.{suggest(self.weights, WEIGHTS[1:])}")
        if self.speculative < 0 or self.speculative == 1:
            raise UserError(f"speculative={self.speculative} must be at least 2 tokens, or 0 for one after another.")
        if (self.speculative > 0) + (self.tokens_per_step > 1) + (self.no_repeat_ngram_size > 0) > 1:
            raise UserError(
                f"speculative={self.speculative}, tokens_per_step={self.tokens_per_step} and no_repeat_ngram_size="
                f"{self.no_repeat_ngram_size} exclude one another: leave all but one of them at 0, 1 and 0."
            )

    @property
    def guided(self) -> bool:
        """Whether rows without the prompt are needed."""
        return self.cfg_scale != 1

    def guidance(self, steps: int) -> Float[np.ndarray, " N"]:
        """The scale at each of `steps` tokens, float32."""
        return guidance.scales(
            self.cfg_schedule, steps, self.cfg_scale, power=self.cfg_power, start=self.cfg_start, end=self.cfg_end
        )


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, with the names of today."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


def read(values: Mapping[str, Any]) -> Sampling:
    """The `Sampling` of settings by name, old names too. Raises UserError for what there is not, or is out of range."""
    return to_dataclass(Sampling, renamed(values))
