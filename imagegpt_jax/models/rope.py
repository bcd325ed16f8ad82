"""Rotary wavelengths that were stretched after training, so that a model reads longer sequences than it was trained on.

The kinds and their formulas are those of published Llama-like checkpoints, named as `transformers` names them.

Shapes: B batch, L length, P pairs of head dimensions.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from imagegpt_jax.errors import UserError, suggest

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the wavelengths of a trained model are stretched; what a kind does not name, it does not use.

    Attributes:
      kind: "default" (not at all); "linear" (positions divided by `factor`, arXiv:2306.15595); "dynamic" (the base
        grows with sequences beyond `max_length`); "yarn" (arXiv:2309.00071); "longrope" (arXiv:2402.13753); "llama3"
        (long waves divided by `factor`); "proportional" (the first `share` of the pairs is turned, at wavelengths of
        all).
      factor: how much longer sequences become.
      max_length: longest sequence of the stretched model ("dynamic").
      original_length: longest sequence in training ("yarn", "longrope", "llama3").
      attention_factor: multiplies cos and sin ("yarn", "longrope"), which sharpens attention.
      low_freq_factor: of "llama3": waves longer than original_length / this are divided by `factor`.
      high_freq_factor: of "llama3": waves shorter than original_length / this stay.
      beta_fast: of "yarn": pairs that turn more often than this in original_length stay.
      beta_slow: of "yarn": pairs that turn less often than this are divided by `factor`.
      truncate: of "yarn": whether the limits between pairs are rounded to whole pairs.
      short_factor: of "longrope": divides each pair's frequency, in sequences up to original_length.
      long_factor: the same for longer sequences.
      share: of "proportional".
    """

    kind: str = "default"
    factor: float = 1.0
    max_length: int = 0
    original_length: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    share: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown rope_scaling kind {self.kind!r}.{suggest(self.kind, KINDS)}")


def scaled(
    scaling: RopeScaling, theta: float, size: int, positions_BL: Int[Array, "B L"], dtype: Any
) -> tuple[Float[Array, " P"], float]:
    """Frequency of each of `size / 2` pairs in radians per position, and the factor of cos and sin."""
    exponent_P = np.arange(0, size, 2) / size
    wave_P = theta**-exponent_P
    kind, factor = scaling.kind, scaling.factor
    length = jnp.max(positions_BL) + 1
    if kind == "linear":
        wave_P = wave_P / factor
    elif kind == "dynamic":
        grown = jnp.maximum(length, scaling.max_length).astype(dtype) / scaling.max_length
        base = theta * (factor * grown - (factor - 1)) ** (size / (size - 2))
        return (base ** -jnp.asarray(exponent_P, dtype)).astype(dtype), 1.0
    elif kind == "yarn":
        wave_P = _yarn(scaling, theta, size, wave_P)
    elif kind == "longrope":
        short_P, long_P = (wave_P / np.asarray(f) for f in (scaling.short_factor, scaling.long_factor))
        is_long = length > scaling.original_length
        return jnp.where(is_long, jnp.asarray(long_P, dtype), jnp.asarray(short_P, dtype)), scaling.attention_factor
    elif kind == "llama3":
        wave_P = _llama3(scaling, wave_P)
    elif kind == "proportional":
        turned_P = np.arange(size // 2) < int(scaling.share * size // 2)
        wave_P = np.where(turned_P, wave_P, 0.0) / factor
    return jnp.asarray(wave_P, dtype), scaling.attention_factor if kind == "yarn" else 1.0


def _yarn(scaling: RopeScaling, theta: float, size: int, wave_P: np.ndarray) -> np.ndarray:
    """Blends each pair between its own frequency and the one divided by `factor` (arXiv:2309.00071, section 3.2)."""

    def pair_of(turns: float) -> float:
        return size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    slow_P = np.clip((np.arange(size // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return wave_P / scaling.factor * slow_P + wave_P * (1 - slow_P)


def _llama3(scaling: RopeScaling, wave_P: np.ndarray) -> np.ndarray:
    """Divides long waves by `factor`, leaves short ones, and blends between (Llama 3.1, arXiv:2407.21783)."""
    turns_P = scaling.original_length * wave_P / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend_P = (turns_P - low) / (high - low)
    middle_P = (1 - blend_P) * wave_P / scaling.factor + blend_P * wave_P
    return np.where(turns_P < low, wave_P / scaling.factor, np.where(turns_P > high, wave_P, middle_P))
