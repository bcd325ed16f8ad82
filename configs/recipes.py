"""Published decoders by name, for `configs/decoder.py:recipe=NAME`: what differs from the size that each starts from.

Numbers are those of the papers, and where these leave one open, of the systems' own published configs.
"""

import dataclasses
from typing import Any

IMAGENET = 1_281_167  # pictures of an epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One system.

    Attributes:
      size: of `configs/decoder.py` that it starts from.
      tokenizer: argument of `configs/tokenizer.py`, for the shape of an untrained tokenizer.
      tokenizer_changes: what differs from that.
      downsample: pixels per code.
      res: side of its pictures in pixels.
      changes: what differs from the size.
    """

    size: str
    tokenizer: str = "recipe=llamagen_vq16"
    tokenizer_changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    downsample: int = 16
    res: int = 256
    changes: dict[str, Any]


def _llamagen(size: str) -> Recipe:
    """AdamW, 1e-4 for each 256 pictures of a batch, no warm-up; trained on the codes of ten crops, cut at 1.1."""
    side = int(1.1 * 256)
    return Recipe(
        size=size,
        changes={
            "steps": 300 * IMAGENET // 256,
            "data.text_vocab_size": 0,
            "data.train_ops": f"decode|resize_small({side})|central_crop({side})|ten_crop(256)|value_range(-1,1)",
        },
    )


def _text_to_image(res: int, pictures: int, **model: int) -> Recipe:
    """LlamaGen, text-conditional: 120 features of FLAN-T5-XL, of which the last stands where a picture begins.

    T5 is not read here: `text_encoder` names a language model, and `model.feature_width=0` takes its width. How long it
    was trained is not published, so this is one pass over as many pictures. Sampling is that of the authors' program.
    """
    return Recipe(
        size="XL",
        res=res,
        changes={
            "steps": pictures // 256,
            "data.train": "tfds:coco_captions,split=train",
            "data.validation": "tfds:coco_captions,split=validation",
            "data.use_labels": False,
            "data.num_classes": 0,
            "data.text_vocab_size": 0,
            "data.text_length": 120,
            "model.feature_width": 2048,
            "model.feature_length": 120,
            "model.feature_begins": True,
            "sampling.cfg_scale": 7.5,
            "sampling.top_k": 1000,
            **({"topology": ""} if model else {}),
            **{f"model.{name}": value for name, value in model.items()},
        },
    )


def _rar(depth: int, heads: int, width: int, mlp_width: int, cfg_scale: float, cfg_power: float) -> Recipe:
    """250k steps of 2048: random order until 125k, raster from 187.5k; MaskGIT-VQGAN's 1024 codes."""
    return Recipe(
        size="B",
        tokenizer="recipe=vqgan_f16",
        tokenizer_changes={"model.quantizer.num_codes": 1024},
        changes={
            "steps": 250_000,
            "batch_size": 2048,
            "eval_batch_size": 2048,
            "topology": "",
            "data.text_vocab_size": 0,
            "data.order.random_until": 125_000,
            "data.order.raster_from": 187_500,
            "model.depth": depth,
            "model.heads": heads,
            "model.width": width,
            "model.mlp_width": mlp_width,
            "model.norm": "layer",
            "model.norm_eps": 1e-6,
            "model.mlp": "gelu",
            "model.activation": "gelu",
            "model.bias": True,
            "model.position": "learned",
            "model.max_length": 32,
            "model.qk_norm": True,
            "model.target_positions": True,
            "model.conditioning": "adaptive_norm",
            "model.attention": "xla",  # attention dropout
            "model.token_dropout": 0.0,
            "model.residual_dropout": 0.1,
            "model.mlp_dropout": 0.1,
            "model.attention_dropout": 0.1,
            "model.remat": "full",
            "optim.lr": 4e-4,
            "optim.b2": 0.96,
            "optim.weight_decay": 0.03,
            "optim.schedule": "cosine",
            "optim.warmup_steps": 62_500,
            "optim.final_lr_ratio": 1e-5 / 4e-4,
            "sampling.cfg_scale": cfg_scale,
            "sampling.cfg_schedule": "power_cosine",
            "sampling.cfg_power": cfg_power,
        },
    )


def _imagegpt(depth: int, heads: int, width: int, lr: float) -> Recipe:
    """GPT-2 blocks over colours, unconditional. Its palette comes from its weights, by `convert`."""
    return Recipe(
        size="B",
        tokenizer="size=vq16",
        tokenizer_changes={
            # A stand-in: one code for each pixel.
            "model.base_width": 32,
            "model.width_mults": (1,),
            "model.attention_levels": (),
            "model.mid_attention": False,
            "model.z_channels": 32,
            "model.quantizer.num_codes": 512,
            "model.quantizer.code_dim": 3,
            "model.quantizer.l2_normalize": False,
        },
        downsample=1,
        res=32,
        changes={
            "steps": 1_000_000,
            "batch_size": 128,
            "eval_batch_size": 128,
            "topology": "",
            "data.use_labels": False,
            "data.num_classes": 0,
            "data.text_vocab_size": 0,
            "data.text_length": 0,
            "data.guidance_dropout": 0.0,
            "model.depth": depth,
            "model.heads": heads,
            "model.width": width,
            "model.mlp_width": 4 * width,
            "model.mlp": "gelu",
            "model.activation": "quick_gelu",
            "model.attention_bias": True,
            "model.mlp_bias": True,
            "model.position": "learned",
            "model.max_length": 48,
            "model.token_dropout": 0.0,
            "model.residual_dropout": 0.0,
            "model.mlp_dropout": 0.0,
            "model.remat": "full",
            "optim.name": "adam",
            "optim.lr": lr,
            "optim.schedule": "cosine",
            "optim.warmup_steps": IMAGENET // 128,  # an epoch
            "optim.final_lr_ratio": 0.0,
            "optim.weight_decay": 0.0,
            "optim.clip_norm": 0.0,
            "sampling.cfg_scale": 1.0,
        },
    )


RECIPES = {
    **{f"llamagen_{size}": _llamagen(size) for size in ("B", "L", "XL", "XXL", "3B")},
    # The released ones: 50 million pictures at 256 px, then 10 million at 512 px.
    "llamagen_t2i_XL": _text_to_image(256, 50_000_000),
    "llamagen_t2i_XL_512": _text_to_image(512, 10_000_000),
    # The other sizes that the authors' code has for text.
    "llamagen_t2i_1B": _text_to_image(256, 50_000_000, depth=22, heads=32, width=2048, mlp_width=5632),
    "llamagen_t2i_7B": _text_to_image(256, 50_000_000, depth=32, heads=32, width=4096, mlp_width=11008),
    "rar_B": _rar(24, 16, 768, 3072, 16.0, 2.75),
    "rar_L": _rar(24, 16, 1024, 4096, 15.5, 2.5),
    "rar_XL": _rar(32, 16, 1280, 5120, 6.9, 1.5),
    "rar_XXL": _rar(40, 16, 1408, 6144, 8.0, 1.2),
    # The paper tries learning rates from 0.01 down until one is stable: these are starting points.
    "imagegpt_S": _imagegpt(24, 8, 512, 3e-3),
    "imagegpt_M": _imagegpt(36, 8, 1024, 3e-3),
    "imagegpt_L": _imagegpt(48, 16, 1536, 1e-3),
    "after_dalle_mini": Recipe(
        size="20B",
        tokenizer="recipe=vqgan_f16",
        changes={
            "steps": 200_000,
            "batch_size": 4224,
            "eval_batch_size": 4224,
            "topology": "",
            "data.text_length": 64,
            "model.depth": 12,
            "model.heads": 16,
            "model.width": 1024,
            "model.mlp_width": 4096,
            "model.norm": "layer",
            "model.mlp": "gelu",
            "model.position": "learned",
            "model.max_length": 128,
            "optim.name": "shampoo",  # in blocks of 2048
            "optim.lr": 1e-4,
            "optim.b2": 0.99,
            "optim.schedule": "constant",
            "optim.warmup_steps": 10_000,
            "optim.mu_dtype": "float32",
            "optim.weight_decay": 0.0,
            "optim.clip_norm": 0.0,
        },
    ),
    "after_parti_20b": Recipe(
        size="20B",
        tokenizer="size=vq8",
        tokenizer_changes={"model.quantizer.num_codes": 8192},
        downsample=8,
        changes={
            "model.depth": 64,
            "model.heads": 64,
            "model.width": 4096,
            "model.mlp_width": 16384,
            "model.mlp": "gelu",
            "model.norm": "layer",
            "optim.b2": 0.96,
            "optim.schedule": "exponential",
            "optim.decay_start": 85_000,
            "optim.final_lr_ratio": 0.025,
        },
    ),
}
