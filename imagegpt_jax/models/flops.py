"""FLOPs that a model needs, counted from its shapes: what MFU (arXiv:2204.02311, appendix B) is a share of.

One multiplication and one addition are two. Recomputation does not count, and causal attention counts the half of the
scores that are not masked. XLA's own count sees the body of a scan once and nothing of a kernel, so it is not used.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from imagegpt_jax.models.gpt_config import GPTConfig


def decoder_forward(
    config: GPTConfig, batch: int, length: int, scored: Sequence[tuple[int, int]], context: int = 0
) -> float:
    """FLOPs of a forward pass with its loss, or of a call that adds tokens to a cache.

    Args:
      config: the decoder.
      batch: sequences.
      length: tokens of each that go through the blocks (prefix features come on top, where there is no context).
      scored: (number of ids, positions of each sequence that are scored against so many), for each kind of target.
      context: tokens in a cache that each token attends to as well, prefix features included. They went through the
        blocks before, so only features that modulate the blocks (`adaptive_norm`) are projected again.
    """
    D, N, K, H, F = config.width, config.heads, config.num_kv_heads, config.head_width, config.mlp_width
    prefixed = config.conditioning == "prefix"
    prefix = config.feature_length - config.feature_begins if prefixed and not context else 0
    tokens = length + prefix
    matrices = D * (N + 2 * K) * H + N * H * D + (3 if config.mlp == "swiglu" else 2) * D * F
    per_block = 2 * tokens * matrices + (2 * tokens + 4 * context) * tokens * N * H  # causal: half of 4 L^2 N H
    projected = config.feature_length if not (prefixed and context) else 0
    once = 2 * projected * (config.feature_width * D + D * D)
    once += 2 * length * D * D if config.target_positions else 0
    if config.conditioning == "adaptive_norm":
        per_block += 2 * D * 6 * D
        once += 2 * D * 2 * D
    head = sum(2 * positions * D * ids for ids, positions in scored)
    return float(batch * (config.depth * per_block + once + head))


def traced(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of the matrix products and convolutions of a function at abstract arguments, scans counted in full."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[d] for d in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
        elif name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval, equation.outvars[0].aval
            spec = params["dimension_numbers"].rhs_spec
            # An output element is a sum over the kernel's window and input channels; dilated inputs are mostly zeros.
            window = math.prod(kernel.shape) / kernel.shape[spec[0]]
            total += 2.0 * math.prod(out.shape) * window / math.prod(params["lhs_dilation"])
        else:
            times = params.get("length", 1) if name == "scan" else 1
            inner = [_count(j) for j in _jaxprs(params)]
            total += times * (max(inner, default=0.0) if name == "cond" else sum(inner))
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    jaxprs = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                jaxprs.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                jaxprs.append(item)
    return jaxprs
