"""Decoders of `transformers`: Llama, GPT-2 and ImageGPT, as configs and tables.

A folder's `config.json` says all there is to know. Values that change what is computed in a way this project does not
provide for are refused in one sentence.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from imagegpt_jax.convert.core import LINEAR, Arrays, Change, Rule, cut, drop, filled_in, renamed, rule
from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.models.rope import KINDS, RopeScaling

# Their names of activations -> ours (`layers.ACTIVATIONS`).
_SAME = ("gelu", "laplace", "leaky_relu", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "tanh")
_TANH = ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh")
ACTIVATIONS = {
    **dict(zip(_SAME, _SAME, strict=True)),
    **dict.fromkeys(_TANH, "gelu_tanh"),
    "gelu_10": "clipped_gelu",
    "gelu_python": "gelu",
    "hardswish": "hard_swish",
    "linear": "identity",
    "sqrtsoftplus": "sqrt_softplus",
    "swish": "silu",
}


def activation(name: str) -> str:
    """Our name of an activation; raises UserError for one that has parameters of its own, or that nobody knows."""
    if name not in ACTIVATIONS:
        raise UserError(f"the activation {name!r} is not supported.{suggest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


# ------------------------------------------------------------------------------------------------------------- Llama


# What `config.json` may leave out.
_LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
          "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
          "hidden_act": "silu", "head_dim": None, "num_key_value_heads": None, "attention_bias": False,
          "mlp_bias": False, "tie_word_embeddings": False, "attention_dropout": 0.0}  # fmt: skip
# What GPT-2 and ImageGPT share.
_GPT = {"n_inner": None, "add_cross_attention": False, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "embd_pdrop": 0.1, "resid_pdrop": 0.1,
        "attn_pdrop": 0.1}  # fmt: skip
_GPT2 = {**_GPT, "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
         "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}  # fmt: skip
_IMAGEGPT = {**_GPT, "vocab_size": 513, "n_positions": 1024, "n_embd": 512, "n_layer": 24, "n_head": 8,
             "activation_function": "quick_gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False}  # fmt: skip


# Keys of `config.json` -> keys of `GPTConfig` that mean the same.
_LLAMA_KEYS = {"vocab_size": "vocab_size", "hidden_size": "width", "intermediate_size": "mlp_width",
               "num_hidden_layers": "depth", "num_attention_heads": "heads", "rms_norm_eps": "norm_eps",
               "attention_bias": "attention_bias", "mlp_bias": "mlp_bias", "tie_word_embeddings": "tie_embeddings",
               "attention_dropout": "attention_dropout"}  # fmt: skip
_GPT_KEYS = {"vocab_size": "vocab_size", "n_positions": "max_length", "n_embd": "width", "n_layer": "depth",
             "n_head": "heads", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings",
             "scale_attn_by_inverse_layer_idx": "attention_scale_by_layer", "embd_pdrop": "token_dropout",
             "resid_pdrop": "residual_dropout", "attn_pdrop": "attention_dropout"}  # fmt: skip


def llama_config(about: Mapping[str, Any]) -> GPTConfig:
    """Config of a Llama (arXiv:2302.13971) from its `config.json`; raises UserError for values not supported here."""
    config = filled_in(about, _LLAMA)
    heads = config["num_attention_heads"]
    head_dim = config["head_dim"] or config["hidden_size"] // heads
    theta, scaling = _rope(config)
    return GPTConfig(
        **renamed(config, _LLAMA_KEYS),
        kv_heads=config["num_key_value_heads"] or heads,
        head_dim=head_dim,
        norm="rms",
        mlp="swiglu",
        activation=activation(config["hidden_act"]),
        position="rope",
        rope_theta=theta,
        rotary_dims=(head_dim, 0, 0),
        rope_scaling=scaling,
    )


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """Base and stretching of a config, in the form of `transformers` 5 (rope_parameters) or 4 (rope_scaling)."""
    values = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(values.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in KINDS:
        raise UserError(f"the rope_type {kind!r} is not supported.{suggest(kind, KINDS)}")
    share = values.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if share != 1.0 and kind not in ("default", "proportional"):  # "default" does not look at it
        raise UserError(f"partial_rotary_factor={share} is not supported with rope_type={kind!r}: only 1 is.")
    longest = config["max_position_embeddings"]
    original = (
        config.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or longest
    )
    factor = values.get("factor")
    stretched = {"kind": kind, "max_length": longest, "original_length": original, "share": share}
    if kind in ("default", "proportional"):
        factor = factor or 1.0
    elif kind in ("yarn", "longrope"):
        factor = factor or longest / original
        stretched["attention_factor"] = _attention_factor(kind, factor, original, values)
    if factor is None:
        raise UserError(f"rope_type={kind!r} needs a factor, and the config has none.")
    if kind == "yarn":
        stretched |= {name: float(values.get(name) or least) for name, least in (("beta_fast", 32), ("beta_slow", 1))}
        stretched["truncate"] = bool(values.get("truncate", True))
    if kind == "longrope":
        stretched |= {name: tuple(map(float, values[name])) for name in ("short_factor", "long_factor")}
    if kind == "llama3":
        stretched |= {name: float(values[name]) for name in ("low_freq_factor", "high_freq_factor")}
    return theta, RopeScaling(factor=float(factor), **stretched)


def _attention_factor(kind: str, factor: float, original: int, values: Mapping[str, Any]) -> float:
    """The factor of cos and sin that a config gives, or that its kind takes by default."""
    given = values.get("attention_factor")
    if given is not None:
        return float(given)
    if kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    ours, all_dims = values.get("mscale"), values.get("mscale_all_dim")
    return scale(ours) / scale(all_dims) if ours and all_dims else scale(1.0)


def llama_table(config: GPTConfig, prefix: str = "model.") -> list[Rule]:
    """Names of a LlamaForCausalLM (`prefix` "" for a LlamaModel)."""
    layer, block = prefix + "layers.{i}.", "blocks.{i}."
    maps = {
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.out",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }
    table = [
        rule(prefix + "embed_tokens.weight", "embed.weight"),
        rule(prefix + "norm.weight", "norm.scale"),
        rule(layer + "input_layernorm.weight", block + "attention_norm.scale"),
        rule(layer + "post_attention_layernorm.weight", block + "mlp_norm.scale"),
        *drop(layer + "self_attn.rotary_emb.inv_freq"),
    ]
    for theirs, ours in maps.items():
        table.append(rule(f"{layer}{theirs}.weight", f"{block}{ours}.weight", LINEAR))
        table.append(rule(f"{layer}{theirs}.bias", f"{block}{ours}.bias"))
    return table + _head(config)


def _head(config: GPTConfig) -> list[Rule]:
    return drop("lm_head.weight") if config.tie_embeddings else [rule("lm_head.weight", "head.weight")]


# ------------------------------------------------------------------------------------------------- GPT-2 and ImageGPT


def gpt2_config(about: Mapping[str, Any]) -> GPTConfig:
    """Config of a GPT-2 from its `config.json`; raises UserError for values that are not supported."""
    return _gpt2_like(filled_in(about, _GPT2), "layer")


def imagegpt_config(about: Mapping[str, Any]) -> GPTConfig:
    """As `gpt2_config`, of an ImageGPT, whose norms neither centre nor shift, and that never predicts its last id."""
    return _gpt2_like(filled_in(about, _IMAGEGPT), "rms")


def _gpt2_like(config: Mapping[str, Any], norm: str) -> GPTConfig:
    if config["add_cross_attention"]:
        raise UserError(
            "add_cross_attention=True is not supported: decoders here read what they are given as a prefix."
        )
    return GPTConfig(
        **renamed(config, _GPT_KEYS),
        mlp_width=config["n_inner"] or 4 * config["n_embd"],
        norm=norm,
        mlp="gelu",
        activation=activation(config["activation_function"]),
        bias=True,
        attention_scale=0.0 if config["scale_attn_weights"] else 1.0,
        position="learned",
        head_size=config["vocab_size"] - 1 if norm == "rms" and not config["tie_word_embeddings"] else 0,
        mlp_dropout=config["resid_pdrop"],
    )


def gpt2_table(config: GPTConfig, prefix: str = "transformer.") -> list[Rule]:
    """Names of a GPT2LMHeadModel or ImageGPTForCausalImageModeling (`prefix` "" for the models without a head).

    Their Conv1D keeps [in, out] as we do, with queries, keys and values beside each other.
    """
    layer, block = prefix + "h.{i}.", "blocks.{i}."
    thirds = [config.width] * 3
    table = [
        rule(prefix + "wte.weight", "embed.weight"),
        rule(prefix + "wpe.weight", "position", _POSITIONS),
        rule(prefix + "ln_f.weight", "norm.scale"),
        *drop(layer + "attn.bias", layer + "attn.masked_bias"),
    ]
    norms = {layer + "ln_1": block + "attention_norm", layer + "ln_2": block + "mlp_norm"}
    table += [rule(f"{theirs}.weight", f"{ours}.scale") for theirs, ours in norms.items()]
    if config.norm == "layer":
        table += [rule(f"{theirs}.bias", f"{ours}.bias") for theirs, ours in norms.items()]
        table.append(rule(prefix + "ln_f.bias", "norm.bias"))
    for kind in ("weight", "bias"):
        parts = [f"{block}attention.{part}.{kind}" for part in ("query", "key", "value")]
        table.append(rule(f"{layer}attn.c_attn.{kind}", parts, cut(thirds, -1)))
        for theirs, ours in {"attn.c_proj": "attention.out", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}.items():
            table.append(rule(f"{layer}{theirs}.{kind}", f"{block}{ours}.{kind}"))
    return table + _head(config)


def _one_table(arrays: Arrays) -> Arrays:
    """One table of positions -> ours for (t, row, column): text moves along all three at once, so two are zero."""
    (table,) = arrays
    return [np.stack([table, np.zeros_like(table), np.zeros_like(table)])]


def _only_table(arrays: Arrays) -> Arrays:
    (tables,) = arrays
    if tables[1:].any():
        raise UserError(
            "the learned positions of rows and columns are in use, and the other format has one table: it cannot be"
            " written."
        )
    return [tables[0]]


_POSITIONS = Change(_one_table, _only_table)


# --------------------------------------------------------------------------------------------------- the way back

_THEIRS = {"gelu_tanh": "gelu_new", "clipped_gelu": "gelu_10", "identity": "linear",
           "hard_swish": "hardswish", "sqrt_softplus": "sqrtsoftplus"}  # fmt: skip


def _act(config: GPTConfig) -> str:
    name = config.activation or ("silu" if config.mlp == "swiglu" else "gelu_tanh")
    return _THEIRS.get(name, name)


def llama_about(config: GPTConfig) -> dict[str, Any]:
    """The `config.json` of a LlamaForCausalLM for a decoder of this config."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": config.rope_theta}
    used = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate"),
        "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "proportional": ("factor",),
    }
    rope |= {name: getattr(scaling, name) for name in used.get(scaling.kind, ())}
    if scaling.kind in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "proportional":
        rope["partial_rotary_factor"] = scaling.share
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for theirs, ours in _LLAMA_KEYS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": _act(config),
        "max_position_embeddings": scaling.max_length or config.max_length or 2048,
        "rope_parameters": rope,
        "attention_bias": config.attention_bias or config.bias,
        "mlp_bias": config.mlp_bias or config.bias,
    }


def gpt2_about(config: GPTConfig) -> dict[str, Any]:
    """The `config.json` of a GPT2LMHeadModel, or with RMS norms of an ImageGPTForCausalImageModeling."""
    image = config.norm == "rms"
    return {
        "architectures": ["ImageGPTForCausalImageModeling" if image else "GPT2LMHeadModel"],
        "model_type": "imagegpt" if image else "gpt2",
        **{theirs: getattr(config, ours) for theirs, ours in _GPT_KEYS.items()},
        "n_inner": config.mlp_width,
        "activation_function": _act(config),
        "scale_attn_weights": config.attention_scale == 0.0,
    }
