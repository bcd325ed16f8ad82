"""LlamaGen's decoders (arXiv:2406.06525), class- and text-conditional, as configs and tables.

Their ids, kept as they are: image codes 0 .. K - 1, then here the classes K .. K + C - 1 and "no class" K + C. The
class, or the last of 120 projected text features, stands where a <boi> would, and predicts the first code.

Rotary positions are the code's row and column, in interleaved pairs; their code gives the prefix cos = sin = 0, so that
nothing of its queries and keys is left. Weights were trained so, and are read so (`GPTConfig.rope_zero_prefix`).

Shapes: D model, N heads, K kv heads, H head dim.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from imagegpt_jax.convert.core import LINEAR, Arrays, Change, Rule, drop, join, rule
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.weight_files.tensor import Tensor

# Heads by (layers, width): weights alone do not tell them.
PUBLISHED = {
    (12, 768): 12,
    (24, 1024): 16,
    (36, 1280): 20,
    (48, 1536): 24,
    (24, 3200): 32,
    (22, 2048): 32,
    (32, 4096): 32,
}
GRID = (16, 16)  # of the published models at 256 px
_CLASSES = "cls_embedding.embedding_table.weight"
_NO_TEXT = "cls_embedding.uncond_embedding"
_EPS, _BASE = 1e-5, 10000.0


def is_llamagen(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of one of the decoders."""
    return "tok_embeddings.weight" in tensors and (_CLASSES in tensors or _NO_TEXT in tensors)


def config(tensors: Mapping[str, Tensor], about: Mapping[str, Any], heads: int | None) -> GPTConfig:
    """Config from the shapes of the weights, and from `ModelArgs` as far as they are known (`about`).

    Raises:
      UserError: if nothing tells the number of heads, which `heads` overrides.
    """
    codes, width = tensors["tok_embeddings.weight"].shape
    depth = len({m[1] for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))})
    heads = heads or about.get("n_head") or PUBLISHED.get((depth, width))
    if heads is None:
        raise UserError(
            f"{depth} layers of width {width} are no published LlamaGen, and weights do not tell the number of heads:"
            " give it once, python -m imagegpt_jax.convert SOURCE TARGET --heads=12 for example, and use TARGET (of"
            " calls, load_decoder takes heads=12)."
        )
    head_dim = width // heads
    if head_dim * heads != width or head_dim % 4:
        raise UserError(
            f"{heads} heads do not fit a width of {width}: heads must divide it into multiples of four, half for rows"
            " and half for columns."
        )
    rows = tensors["layers.0.attention.wqkv.weight"].shape[0]
    features = tensors[_NO_TEXT].shape if _NO_TEXT in tensors else (0, 0)
    return _config(
        codes=codes,
        classes=tensors[_CLASSES].shape[0] if _CLASSES in tensors else 0,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=(rows - width) // (2 * head_dim),
        mlp_width=tensors["layers.0.feed_forward.w1.weight"].shape[0],
        features=(features[0], features[1]),
        about=about,
    )


def _config(
    *,
    codes: int,
    classes: int,
    width: int,
    heads: int,
    features: tuple[int, int],
    about: Mapping[str, Any],
    **sizes: Any,
) -> GPTConfig:
    """Config from sizes; `features` are number and width of those of text."""
    head_dim = width // heads
    text = features[0] > 0
    return GPTConfig(
        vocab_size=codes + classes,
        head_size=codes if classes else 0,
        width=width,
        heads=heads,
        norm_eps=float(about.get("norm_eps", _EPS)),
        rope_theta=float(about.get("rope_base", _BASE)),
        rotary_dims=(0, head_dim // 2, head_dim // 2),
        rope_zero_prefix=True,
        token_dropout=float(about.get("token_dropout_p", 0.1)),
        residual_dropout=float(about.get("resid_dropout_p", 0.1)),
        mlp_dropout=float(about.get("ffn_dropout_p", 0.1)),
        attention_dropout=float(about.get("attn_dropout_p", 0.0)),
        feature_length=features[0],
        feature_width=features[1],
        feature_begins=text,
        **sizes,
    )


def as_published(config: GPTConfig) -> GPTConfig:
    """The config that comes back if a decoder is written as a LlamaGen: what that has no place for is at default."""
    codes = config.head_size or config.vocab_size
    return _config(
        codes=codes,
        classes=config.vocab_size - codes,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        kv_heads=config.num_kv_heads,
        mlp_width=config.mlp_width,
        features=(config.feature_length, config.feature_width),
        about={"norm_eps": config.norm_eps, "rope_base": config.rope_theta},
    )


def table(config: GPTConfig) -> list[Rule]:
    """Names of LlamaGen's Transformer."""
    codes = config.head_size or config.vocab_size
    rules = [
        rule("norm.weight", "norm.scale"),
        rule("output.weight", "head.weight"),
        rule("layers.{i}.attention_norm.weight", "blocks.{i}.attention_norm.scale"),
        rule("layers.{i}.ffn_norm.weight", "blocks.{i}.mlp_norm.scale"),
        rule(
            "layers.{i}.attention.wqkv.weight",
            [f"blocks.{{i}}.attention.{part}.weight" for part in ("query", "key", "value")],
            _qkv(config),
        ),
        rule("layers.{i}.attention.wo.weight", "blocks.{i}.attention.out.weight", LINEAR),
        *drop("freqs_cis", "causal_mask", "layers.{i}.attention.kv_cache.{part:k_cache|v_cache}"),
    ]
    for theirs, ours in {"w1": "gate", "w3": "up", "w2": "down"}.items():
        rules.append(rule(f"layers.{{i}}.feed_forward.{theirs}.weight", f"blocks.{{i}}.mlp.{ours}.weight", LINEAR))
    if config.feature_width:
        rules.append(rule("tok_embeddings.weight", "embed.weight"))
        rules.append(rule(_NO_TEXT, "features.unconditional"))
        rules.append(rule("cls_embedding.cap_proj.{fc:fc1|fc2}.weight", "features.{fc}.weight", LINEAR))
    else:
        sizes = (codes, config.vocab_size - codes)
        rules.append(rule(["tok_embeddings.weight", _CLASSES], "embed.weight", join(sizes, 0)))
    return rules


def _qkv(config: GPTConfig) -> Change:
    """One matrix [(N + 2 K) H, D] <-> three [D, ...], with interleaved rotary pairs <-> halves."""
    heads, kv_heads, head_dim = config.heads, config.num_kv_heads, config.head_width
    query, key = heads * head_dim, (heads + kv_heads) * head_dim

    def load(arrays: Arrays) -> Arrays:
        q, k, v = np.split(arrays[0], (query, key))
        return [_to_halves(q, heads).T, _to_halves(k, kv_heads).T, v.T]

    def save(arrays: Arrays) -> Arrays:
        q, k, v = (x.T for x in arrays)
        return [np.concatenate([_to_pairs(q, heads), _to_pairs(k, kv_heads), v])]

    return Change(load, save)


def _to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows 0, 1, 2, 3, ... of each head -> 0, 2, ..., 1, 3, ..."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `_to_halves`."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def model_args(config: GPTConfig, grid: tuple[int, int]) -> dict[str, Any]:
    """LlamaGen's `ModelArgs` of a config, for the `config.json` beside exported weights."""
    text = config.feature_width > 0
    codes = config.head_size or config.vocab_size
    return {
        "dim": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_kv_head": config.num_kv_heads,
        "norm_eps": config.norm_eps,
        "rope_base": config.rope_theta,
        "vocab_size": codes,
        "block_size": grid[0] * grid[1],
        "model_type": "t2i" if text else "c2i",
        "cls_token_num": config.feature_length if text else 1,
        "num_classes": 1000 if text else config.vocab_size - codes - 1,
        "caption_dim": config.feature_width or 2048,
        "token_dropout_p": config.token_dropout,
        "resid_dropout_p": config.residual_dropout,
        "ffn_dropout_p": config.mlp_dropout,
        "attn_dropout_p": config.attention_dropout,
    }


def settings(source_config: Mapping[str, Any], extras: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a checkpoint's `ModelArgs`: from a `config.json`, and from `args` of a training checkpoint."""
    about = dict(source_config)
    args = vars(extras["args"]) if hasattr(extras.get("args"), "__dict__") else {}
    sizes = {"GPT-B": 12, "GPT-L": 16, "GPT-XL": 20, "GPT-XXL": 24, "GPT-3B": 32, "GPT-1B": 32, "GPT-7B": 32}
    if args.get("gpt_model") in sizes:
        about.setdefault("n_head", sizes[args["gpt_model"]])
    if args.get("image_size") and args.get("downsample_size"):
        about.setdefault("block_size", (args["image_size"] // args["downsample_size"]) ** 2)
    return about
