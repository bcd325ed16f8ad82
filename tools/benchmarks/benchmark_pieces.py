"""What a decoder computes besides products with matrices, in JAX; `benchmark_floor.py` adds up its seconds.

Heads are [batch, length, heads, head width], activations [tokens, width], scores [tokens, codes].
"""

from collections.abc import Callable
from typing import Any


def shapes(config: Any) -> dict[str, tuple[list[tuple[int, ...]], int]]:
    """What else a decoder computes: name -> (shapes of its inputs, how many of them a step has)."""
    model, codes = config.model, config.untrained_tokenizer.model.quantizer.num_codes
    length = config.data.grid[0] * config.data.grid[1]
    tokens, depth = config.batch_size * length, model.depth
    heads = (config.batch_size, length, model.heads, model.width // model.heads)
    return {
        "attention": ([heads] * 3, depth),
        "norms": ([(tokens, model.width), (model.width,)], 2 * depth + 1),
        "activations": ([(tokens, model.mlp_width)] * 2, depth),
        "loss": ([(tokens, codes)], 1),
    }


def pieces() -> dict[str, Callable[..., Any]]:
    """The pieces as functions of arrays."""
    import jax
    import jax.numpy as jnp

    from imagegpt_jax.models.attention import attend_causally, causal_mask

    def loss(logits: jax.Array) -> jax.Array:
        scored = jnp.take_along_axis(logits, jnp.zeros((len(logits), 1), jnp.int32), axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - scored[:, 0])

    return {
        "attention": lambda q, k, v: attend_causally(q, k, v, causal_mask(jnp.zeros(q.shape[:2], jnp.int32))),
        "norms": lambda x, scale: x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale,
        "activations": lambda gate, up: jax.nn.silu(gate) * up,
        "loss": loss,
    }
