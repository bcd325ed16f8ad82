"""Emu3's tokenizer of films (arXiv:2409.18869) in `transformers`, as far as single images need it: config and table.

Its encoder is a VQGAN's with linear maps in attention; the decoder's norms see the codes (MoVQ, arXiv:2209.09002); and
between both and the codes stand convolutions along time.
"""

from collections.abc import Mapping
from typing import Any

from imagegpt_jax.convert.core import CONV3D, Change, Rule, carry, filled_in, rule
from imagegpt_jax.convert.vqgan import about_of, conv_rules, norm_rules, other, published
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.vq import VQConfig

# A linear map as a 1 x 1 convolution.
_POINTWISE = Change(lambda xs: [xs[0].T[None, None]], lambda xs: [xs[0][0, 0].T])


# What `config.json` may leave out.
_DEFAULTS = {"double_latent": False,
             "codebook_size": 32768, "embed_dim": 4, "latent_channels": 4, "in_channels": 3, "out_channels": 3,
             "temporal_downsample_factor": 4, "base_channels": 256, "channel_multiplier": (1, 2, 2, 4),
             "num_res_blocks": 2, "attn_resolutions": (3,), "hidden_size": 1024, "num_attention_heads": 1}  # fmt: skip


def emu3_config(about: Mapping[str, Any]) -> VQConfig:
    """Config of an Emu3 VQVAE from its `config.json`; raises UserError for sizes at which the network cannot run."""
    config = filled_in(about, _DEFAULTS)
    mults, base = config["channel_multiplier"], config["base_channels"]
    at = tuple(sorted({i for i in config["attn_resolutions"] if 0 <= i < len(mults)}))
    wrong = [i for i in (*at, len(mults) - 1) if base * mults[i] != config["hidden_size"]]
    if wrong:
        raise UserError(
            f"hidden_size={config['hidden_size']} is the width of attention, and level {wrong[0]} has"
            f" {base * mults[wrong[0]]} channels: such a network cannot run."
        )
    return published(
        config,
        codes=config["codebook_size"],
        l2_normalize=False,
        out_channels=other(config["out_channels"], config["in_channels"]),
        attention_levels=at,
        attention_heads=config["num_attention_heads"],
        spatial_norm=True,
        frames=config["temporal_downsample_factor"],
    )


def emu3_table(config: VQConfig) -> list[Rule]:
    """Names of an Emu3VQVAE."""
    levels = len(config.width_mults)
    rules = [rule("quantize.embedding.weight", "quantize.embedding")]
    rules += _conv3d("{conv:quant_conv|post_quant_conv}", "{conv}")
    for half, theirs, resample in (
        ("encoder", "encoder.down_block.down", "downsample"),
        ("decoder", "decoder.up_block.up", "upsample"),
    ):
        norm = norm_rules if half == "encoder" else _spatial_norm
        rules += conv_rules(f"{half}.{{conv:conv_in|conv_out}}", f"{half}.{{conv}}")
        rules += norm(f"{half}.norm_out", f"{half}.norm_out")
        for i in range(levels):
            level = f"{theirs}.{i if half == 'encoder' else levels - 1 - i}"
            ours = f"{half}.conv_blocks.{i}"
            rules += _res(f"{level}.block.{{j}}", f"{ours}.res.{{j}}", norm)
            rules += _attention(f"{level}.attn.{{j}}", f"{level}.attn_norms.{{j}}", f"{ours}.attn.{{j}}", norm)
            rules += conv_rules(f"{level}.{resample}.conv", f"{ours}.{resample}.conv")
        middle = f"{half}.middle_block"
        rules += _res(f"{middle}.block_1", f"{half}.mid.0", norm) + _res(f"{middle}.block_2", f"{half}.mid.2", norm)
        rules += _attention(f"{middle}.attn_1", f"{middle}.attn_norm", f"{half}.mid.1", norm)
        rules += _conv3d(f"{half}.time_conv.{{i}}.conv", f"{half}.temporal.time_conv.{{i}}")
        stack, ours = f"{half}.time_res_stack.{{i}}", f"{half}.temporal.time_res_stack.{{i}}"
        rules += _conv3d(f"{stack}.{{conv:conv1|conv2}}", f"{ours}.{{conv}}")
        batch_norm, ours = f"{stack}.{{norm:norm1|norm2}}", f"{ours}.{{norm}}"
        rules += norm_rules(batch_norm, ours) + carry(f"{batch_norm}.num_batches_tracked")
        rules.append(rule(f"{batch_norm}.running_mean", f"{ours}.mean"))
        rules.append(rule(f"{batch_norm}.running_var", f"{ours}.variance"))
    return rules


def _conv3d(theirs: str, ours: str) -> list[Rule]:
    return conv_rules(f"{theirs}.conv", ours, CONV3D)


def _spatial_norm(theirs: str, ours: str) -> list[Rule]:
    rules = norm_rules(f"{theirs}.norm_layer", f"{ours}.norm")
    return rules + conv_rules(f"{theirs}.conv_y", f"{ours}.scale") + conv_rules(f"{theirs}.conv_b", f"{ours}.shift")


def _res(theirs: str, ours: str, norm: Any) -> list[Rule]:
    convs = conv_rules(f"{theirs}.{{conv:conv1|conv2|nin_shortcut}}", f"{ours}.{{conv}}")
    return convs + norm(f"{theirs}.norm1", f"{ours}.norm1") + norm(f"{theirs}.norm2", f"{ours}.norm2")


def _attention(theirs: str, theirs_norm: str, ours: str, norm: Any) -> list[Rule]:
    rules = norm(theirs_norm, f"{ours}.norm")
    for part, conv in {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "proj_out"}.items():
        rules += conv_rules(f"{theirs}.{part}", f"{ours}.{conv}", _POINTWISE)
    return rules


def emu3_about(config: VQConfig) -> dict[str, Any]:
    """The `config.json` of an Emu3VQVAE for a tokenizer of this config."""
    return {
        "architectures": ["Emu3VQVAE"],
        "model_type": "emu3_vqgan",
        **about_of(config, codes="codebook_size"),
        "out_channels": config.image_channels,
        "temporal_downsample_factor": config.frames,
        "attn_resolutions": list(config.attention_levels),
        "hidden_size": config.widths[-1],
        "num_attention_heads": config.attention_heads,
    }
