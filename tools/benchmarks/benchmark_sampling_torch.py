"""PyTorch's lines of `benchmark.py sample`: LlamaGen's sampler and those of `transformers`. Prints JSON.

python tools/benchmarks/benchmark_sampling_torch.py --system=transformers --mode="one batch, static cache" --size=test

LlamaGen's is its published algorithm (arXiv:2406.06525, `autoregressive/models/generate.py` and `gpt.py`) written out:
eager PyTorch, one fused matrix for queries, keys and values, a cache of full length as buffers whose keys and values
are repeated for the heads of their group, a mask for each row, PyTorch's "math" attention alone, guidance by a batch of
both rows, top-k by `topk`, draws by `multinomial`. The network of `transformers` is `LlamaForCausalLM`, of the same
shape.
"""

import importlib.metadata
import json
import os
from collections.abc import Callable
from typing import Any

import benchmark_sampling as sampling
import benchmark_workloads as workloads
import torch
from absl import flags
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from imagegpt_jax import cli

SYSTEM = flags.DEFINE_string("system", "transformers", "Whose sampler.")
MODE = flags.DEFINE_string("mode", "plain", "How it decodes.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of weights and computation.")
SIZE = flags.DEFINE_enum("size", "full", workloads.SIZES, "full, or tiny for tests.")
SECONDS = flags.DEFINE_float("seconds", 0.0, "Draw at least this long.", lower_bound=0.0)

# ---------------------------------------------------------------------------------------------------------- LlamaGen


class RMSNorm(nn.Module):
    """Norm with statistics in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis."""
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns neighbouring pairs of each head, in float32; `table` holds their cosines and sines."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, pairs.size(1), 1, pairs.size(3), 2)
    even = pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1]
    odd = pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1]
    return torch.stack([even, odd], dim=-1).flatten(3).type_as(x)


class Block(nn.Module):
    """Attention over a cache of full length, and SwiGLU."""

    def __init__(self, w: sampling.Workload):
        super().__init__()
        self.heads, self.width = w.heads, w.width
        self.wqkv = nn.Linear(w.width, 3 * w.width, bias=False)
        self.wo = nn.Linear(w.width, w.width, bias=False)
        self.w1 = nn.Linear(w.width, w.mlp_width, bias=False)
        self.w3 = nn.Linear(w.width, w.mlp_width, bias=False)
        self.w2 = nn.Linear(w.mlp_width, w.width, bias=False)
        self.attention_norm, self.ffn_norm = RMSNorm(w.width), RMSNorm(w.width)

    def set_up(self, rows: int, length: int, dtype: torch.dtype) -> None:
        """Makes the cache."""
        shape = (rows, self.heads, length, self.width // self.heads)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)

    def forward(self, x: torch.Tensor, table: torch.Tensor, at: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Adds the tokens at the positions `at`."""
        rows, length, _ = x.shape
        parts = self.wqkv(self.attention_norm(x)).split([self.width] * 3, dim=-1)
        q, k, v = (part.view(rows, length, self.heads, -1) for part in parts)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, table), rotate(k, table), v))
        self.k_cache[:, :, at], self.v_cache[:, :, at] = k, v
        # Once for each query head of a key's group, of which there is one: a copy all the same.
        k, v = (cache.repeat_interleave(1, dim=1) for cache in (self.k_cache, self.v_cache))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.wo(y.transpose(1, 2).contiguous().view(rows, length, -1))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class LlamaGen(nn.Module):
    """LlamaGen's decoder of classes."""

    def __init__(self, w: sampling.Workload):
        super().__init__()
        self.w = w
        self.cls_embedding = nn.Embedding(w.classes + 1, w.width)
        self.tok_embeddings = nn.Embedding(w.codes, w.width)
        self.layers = nn.ModuleList([Block(w) for _ in range(w.depth)])
        self.norm, self.output = RMSNorm(w.width), nn.Linear(w.width, w.codes, bias=False)

    def set_up(self, rows: int, dtype: torch.dtype) -> None:
        """Caches, rotary table and mask for pictures of `rows` rows."""
        length = -(-(self.w.tokens + 1) // 8) * 8
        for block in self.layers:
            block.set_up(rows, length, dtype)
        side, half = self.w.side, self.w.width // self.w.heads // 2
        waves = 1.0 / 10000 ** (torch.arange(0, half, 2).float() / half)
        angles = torch.outer(torch.arange(side).float(), waves)
        grid = torch.cat([angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)], dim=-1).reshape(
            side * side, -1
        )
        table = torch.stack([torch.cos(grid), torch.sin(grid)], dim=-1)
        self.table = torch.cat([torch.zeros(1, *table.shape[1:]), table])
        self.mask = torch.tril(torch.ones(length, length, dtype=torch.bool)).repeat(rows, 1, 1)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Logits of the last token."""
        table, mask = self.table[at], self.mask[:, None, at]
        for block in self.layers:
            x = block(x, table, at, mask)
        return self.output(self.norm(x)).float()[:, -1]


def draw(logits: torch.Tensor, w: sampling.Workload) -> torch.Tensor:
    """Guidance between the two halves of the rows, top-k, softmax, one draw."""
    given, none = logits.chunk(2)
    logits = none + (given - none) * w.cfg_scale
    least = torch.topk(logits, w.top_k)[0][..., -1, None]
    logits = logits.masked_fill(logits < least, -float("inf"))
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


def llamagen(w: sampling.Workload, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """LlamaGen's sampler on random weights."""
    model = LlamaGen(w).to(dtype).eval()
    classes = torch.arange(w.images) % w.classes

    def call() -> torch.Tensor:
        model.set_up(2 * w.images, dtype)
        prefix = torch.cat([classes, torch.full_like(classes, w.classes)])
        token = draw(model(model.cls_embedding(prefix)[:, None], torch.tensor([0])), w)
        drawn = [token]
        for i in range(1, w.tokens):
            with sdpa_kernel(SDPBackend.MATH):  # as its sampling/jobs.py has it
                x = model.tok_embeddings(torch.cat([token, token]))
                token = draw(model(x, torch.tensor([i])), w)
            drawn.append(token)
        return torch.cat(drawn, dim=1)

    return call


# ------------------------------------------------------------------------------------------------------ transformers


def transformers(w: sampling.Workload, dtype: torch.dtype, mode: str) -> Callable[[], torch.Tensor]:
    """`generate` with its own guidance, or its network in a loop with both rows of each image in one batch."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    shape = LlamaConfig(
        vocab_size=w.codes + w.classes + 1,
        hidden_size=w.width,
        intermediate_size=w.mlp_width,
        num_hidden_layers=w.depth,
        num_attention_heads=w.heads,
        num_key_value_heads=w.heads,
        max_position_embeddings=w.tokens + 8,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(shape).to(dtype).eval()
    model.set_attn_implementation("sdpa")
    # Only codes are scored, as everywhere.
    model.lm_head = nn.Linear(w.width, w.codes, bias=False, dtype=dtype)
    classes = w.codes + torch.arange(w.images)[:, None] % w.classes
    none = torch.full_like(classes, w.codes + w.classes)
    kind, cache_name = mode.split(", ")
    static = cache_name == "static cache"

    def by_generate() -> torch.Tensor:
        return model.generate(
            classes,
            attention_mask=torch.ones_like(classes),
            negative_prompt_ids=none,
            guidance_scale=w.cfg_scale,
            do_sample=True,
            top_k=w.top_k,
            min_new_tokens=w.tokens,
            max_new_tokens=w.tokens,
            cache_implementation="static" if static else None,
            pad_token_id=0,
        )[:, 1:]

    def by_hand() -> torch.Tensor:
        cache: Any = StaticCache(config=shape, max_cache_len=w.tokens + 1) if static else DynamicCache(config=shape)
        ids, drawn = torch.cat([classes, none]), []
        for i in range(w.tokens):
            at = torch.tensor([i])
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, position_ids=at[None])
            token = draw(output.logits[:, -1].float(), w)
            drawn.append(token)
            ids = torch.cat([token, token])
        return torch.cat(drawn, dim=1)

    return {"generate": by_generate, "one batch": by_hand}[kind]


def main() -> None:
    """Times the line that the flags name."""
    import transformers as _  # noqa: F401

    imported = sampling.resident()
    torch.manual_seed(0)
    # Tiny steps are for tests: threads that wait for each other on busy processors take seconds for each.
    torch.set_num_threads(workloads.cores() if SIZE.value == "full" else 1)
    workload, dtype = sampling.WORKLOADS[SIZE.value], getattr(torch, DTYPE.value)
    with torch.no_grad():
        if SYSTEM.value == "transformers":
            call = transformers(workload, dtype, MODE.value)
        else:
            call = llamagen(workload, dtype)
        measured = workloads.timed(call, SECONDS.value, fewest=1, warm_up=int(SIZE.value == "test"))
    for codes in measured["results"]:
        assert codes.shape == (workload.images, workload.tokens), codes.shape
        assert codes.min() >= 0
        assert codes.max() < workload.codes
    memory = {"imports_rss_bytes": imported, "peak_rss_bytes": sampling.peak_resident()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    print(json.dumps({"seconds": measured["seconds"], **memory, "versions": versions}))


if __name__ == "__main__":
    os.environ["USE_TORCH"] = "1"  # a TensorFlow beside it is not to be loaded
    cli.run(main)
