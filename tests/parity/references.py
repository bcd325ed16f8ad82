"""Small PyTorch references of published networks that no package has, written from their papers and checkpoints' names.

Shapes: B batch, L length, D model, N heads, H head dim.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# The smallest Llama that tells its parts from each other, as `transformers.LlamaConfig` takes it.
LLAMA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
}


def randomize(module, scale=0.1, seed=0):
    """Random weights, biases and norms: what starts at zero or one would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return module.eval()


def save(model, path, scale=0.2, **settings):
    """Writes a model of `transformers` with random parameters, and returns it."""
    randomize(model, scale).save_pretrained(path, **settings)
    return model


def relative(got, expected):
    """The largest difference, as a share of the largest value expected."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


class LlamaGen(nn.Module):
    """LlamaGen's decoder (arXiv:2406.06525, section 2.2 and 3) with the names of its checkpoints.

    The condition, one class or 120 text features, comes before the codes and is not rotated but erased: its queries and
    keys are multiplied by cos = sin = 0.
    """

    def __init__(self, *, codes, width, depth, heads, kv_heads, mlp_width, classes=0, features=(0, 0), grid=4):
        super().__init__()
        self.heads, self.kv_heads, self.grid, self.head_dim = heads, kv_heads, grid, width // heads
        self.prefix = features[0] or 1
        self.tok_embeddings = nn.Embedding(codes, width)
        self.cls_embedding = nn.Module()
        if classes:
            self.cls_embedding.embedding_table = nn.Embedding(classes + 1, width)
        else:
            self.cls_embedding.cap_proj = nn.Module()
            self.cls_embedding.cap_proj.fc1 = nn.Linear(features[1], width, bias=False)
            self.cls_embedding.cap_proj.fc2 = nn.Linear(width, width, bias=False)
            self.cls_embedding.uncond_embedding = nn.Parameter(torch.randn(*features))
        self.layers = nn.ModuleList()
        for _ in range(depth):
            layer = nn.Module()
            layer.attention_norm, layer.ffn_norm = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
            layer.attention, layer.feed_forward = nn.Module(), nn.Module()
            layer.attention.wqkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
            layer.attention.wo = nn.Linear(width, width, bias=False)
            layer.feed_forward.w1 = nn.Linear(width, mlp_width, bias=False)
            layer.feed_forward.w3 = nn.Linear(width, mlp_width, bias=False)
            layer.feed_forward.w2 = nn.Linear(mlp_width, width, bias=False)
            self.layers.append(layer)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, codes, bias=False)

    def condition(self, labels=None, features=None):
        if labels is not None:
            return self.cls_embedding.embedding_table(labels)[:, None]
        proj = self.cls_embedding.cap_proj
        return proj.fc2(F.gelu(proj.fc1(features), approximate="tanh"))

    def angles(self, length):
        """(cos, sin) of each pair of head dimensions: the first half turns with the row, the second with the column."""
        quarter = self.head_dim // 4
        wave = 10000.0 ** (-2 * torch.arange(quarter) / (self.head_dim // 2))
        place = torch.arange(length - self.prefix)
        turn = torch.cat([(place // self.grid)[:, None] * wave, (place % self.grid)[:, None] * wave], dim=1)
        nothing = torch.zeros(self.prefix, 2 * quarter)
        return torch.cat([nothing, turn.cos()]), torch.cat([nothing, turn.sin()])

    def rotate(self, x, cos, sin):
        """Turns the pairs (2 j, 2 j + 1)."""
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.complex(cos, sin)[:, None]
        return torch.view_as_real(z).reshape(x.shape)

    def forward(self, condition, codes, mask=None):
        """Logits from the last token of the condition on; `mask` says which of the condition's tokens are real."""
        h = torch.cat([condition, self.tok_embeddings(codes)], dim=1)
        B, L, _ = h.shape
        cos, sin = self.angles(L)
        seen = torch.tril(torch.ones(L, L, dtype=torch.bool)).expand(B, L, L).clone()
        if mask is not None:
            seen[:, :, : self.prefix] &= mask[:, None]
            seen |= torch.eye(L, dtype=torch.bool)
        for layer in self.layers:
            x = layer.attention.wqkv(layer.attention_norm(h)).view(B, L, -1, self.head_dim)
            q, k, v = x.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (k, v))
            scores = torch.einsum("bqnh,bknh->bnqk", q, k) * self.head_dim**-0.5
            weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
            h = h + layer.attention.wo(torch.einsum("bnqk,bknh->bqnh", weights, v).reshape(B, L, -1))
            x = layer.ffn_norm(h)
            ffn = layer.feed_forward
            h = h + ffn.w2(F.silu(ffn.w1(x)) * ffn.w3(x))
        return self.output(self.norm(h))[:, self.prefix - 1 :]


class MaskGitVQGAN(nn.Module):
    """MaskGIT's tokenizer (arXiv:2202.04200) with the names of its PyTorch port: no attention, few biases."""

    def __init__(self, *, width=32, mults=(1, 2), blocks=1, z=16, codes=64):
        super().__init__()
        widths = [width * m for m in mults]
        self.encoder, self.decoder, self.quantize = nn.Module(), nn.Module(), nn.Module()
        self.encoder.conv_in = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.encoder.down = nn.ModuleList()
        for before, after in zip([width, *widths[:-1]], widths, strict=True):
            self.encoder.down.append(self._level(before, after, blocks))
        self.encoder.mid = self._level(widths[-1], widths[-1], blocks).block
        self.encoder.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.encoder.conv_out = nn.Conv2d(widths[-1], z, 1)
        self.quantize.embedding = nn.Embedding(codes, z)
        self.decoder.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.decoder.mid = self._level(widths[-1], widths[-1], blocks).block
        ups = []
        for i, after in enumerate(widths):
            level = self._level(widths[min(i + 1, len(widths) - 1)], after, blocks)
            if i:
                level.upsample_conv = nn.Conv2d(after, after, 3, padding=1)
            ups.append(level)
        self.decoder.up = nn.ModuleList(ups)
        self.decoder.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.decoder.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    @staticmethod
    def _level(before, after, blocks):
        level = nn.Module()
        level.block = nn.ModuleList()
        for i in range(blocks):
            block = nn.Module()
            inside = after if i else before
            block.norm1, block.norm2 = nn.GroupNorm(32, inside, eps=1e-6), nn.GroupNorm(32, after, eps=1e-6)
            block.conv1 = nn.Conv2d(inside, after, 3, padding=1, bias=False)
            block.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
            if inside != after:
                block.nin_shortcut = nn.Conv2d(after, after, 1, bias=False)
            level.block.append(block)
        return level

    @staticmethod
    def _block(block, x):
        h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
        return h + (block.nin_shortcut(h) if hasattr(block, "nin_shortcut") else x)

    def encode(self, x):
        x = self.encoder.conv_in(x)
        for i, level in enumerate(self.encoder.down):
            for block in level.block:
                x = self._block(block, x)
            x = F.avg_pool2d(x, 2) if i + 1 < len(self.encoder.down) else x
        for block in self.encoder.mid:
            x = self._block(block, x)
        return self.encoder.conv_out(F.silu(self.encoder.norm_out(x)))

    def decode(self, codes):
        x = self.decoder.conv_in(self.quantize.embedding(codes).permute(0, 3, 1, 2))
        for block in self.decoder.mid:
            x = self._block(block, x)
        for level in reversed(self.decoder.up):
            for block in level.block:
                x = self._block(block, x)
            if hasattr(level, "upsample_conv"):
                x = level.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.decoder.conv_out(F.silu(self.decoder.norm_out(x)))
