"""What a decoder computes besides products with matrices, in PyTorch: `benchmark_pieces.py`'s, on tensors."""

from collections.abc import Callable
from typing import Any


def pieces() -> dict[str, Callable[..., Any]]:
    """The pieces as functions of tensors."""
    import torch
    from torch.nn import functional

    def attention(*heads: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in heads)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return {
        "attention": attention,
        "norms": lambda x, scale: functional.rms_norm(x, scale.shape, scale, 1e-5),
        "activations": lambda gate, up: functional.silu(gate) * up,
        "loss": lambda logits: functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)),
    }
