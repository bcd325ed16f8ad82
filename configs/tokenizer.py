"""Stage 1, the image tokenizer: `--config=configs/tokenizer.py:size=emoji[,quantizer=fsq]`, or `:recipe=ibq_16k`.

Sizes:
  test    seconds on a laptop: for tests
  emoji   the demo: 32 px emoji on two CPU cores, 64 codes an image
  vq16    LlamaGen VQ-16 (arXiv:2406.06525): 256 px, 16 pixels per code, 71.9 M parameters
  vq8     LlamaGen VQ-8: 256 px, 8 pixels per code

Recipes, published systems with all their numbers, on ImageNet at 256 px:
  llamagen_vq16  LlamaGen VQ-16 (arXiv:2406.06525): 16384 codes of 8 dimensions on the unit sphere
  ibq_16k        IBQ (arXiv:2412.02692): 16384 codes of 256, index backpropagation
  open_magvit2   Open-MAGVIT2 (arXiv:2409.04410): 2^18 codes of signs; the network is VQGAN's, its decoder without the
                 published adaptive norms
  vqgan_f16      VQGAN f16-16384 (arXiv:2012.09841, the tokenizer of DALL-E mini): 16384 codes of 256

Quantizers, put into any size at its number of codes (9 bits and more): see QUANTIZER_KINDS below.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from imagegpt_jax.config import choose, parse_arg

# Of models.vq.VQConfig; `quantizer` of models.quantizers.QuantizerConfig.
MODELS = {
    "test": {"stem_patch": 4, "base_width": 16, "width_mults": (1,), "encoder_blocks": 1, "decoder_blocks": 1,
             "attention_levels": (), "mid_attention": False, "z_channels": 16, "norm_groups": 4},
    "emoji": {"stem_patch": 4, "base_width": 128, "width_mults": (1,), "encoder_blocks": 2, "decoder_blocks": 3,
              "attention_levels": (), "mid_attention": False, "z_channels": 128, "norm_groups": 8},
    "vq16": {"stem_patch": 1, "base_width": 128, "width_mults": (1, 1, 2, 2, 4), "encoder_blocks": 2,
             "decoder_blocks": 3, "attention_levels": (4,), "mid_attention": True, "z_channels": 256,
             "norm_groups": 32},
    "vq8": {"stem_patch": 1, "base_width": 128, "width_mults": (1, 2, 2, 4), "encoder_blocks": 2,
            "decoder_blocks": 3, "attention_levels": (3,), "mid_attention": True, "z_channels": 256, "norm_groups": 32},
}  # fmt: skip
QUANTIZERS = {
    "test": {"num_codes": 64, "code_dim": 8, "revival_steps": 8},
    "emoji": {"num_codes": 512, "code_dim": 8, "revival_steps": 64},
    "vq16": {"num_codes": 16384, "code_dim": 8, "revival_steps": 0},
    "vq8": {"num_codes": 16384, "code_dim": 8, "revival_steps": 0},
}
# Quantizer -> its keys, for K codes (or as many as it takes) of the size; bits = log2(K).
QUANTIZER_KINDS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "vq": lambda codes, bits: {},
    "vq_plain": lambda codes, bits: {"l2_normalize": False},
    "vq_ema": lambda codes, bits: {"l2_normalize": False, "codebook_update": "ema"},
    "ibq": lambda codes, bits: {
        "kind": "ibq", "l2_normalize": False, "index_weight": 1.0, "commitment_weight": 1.0, "codebook_weight": 0.25,
        "entropy_weight": 0.05,
    },
    "fsq": lambda codes, bits: {
        "kind": "fsq", "levels": (8,) * (bits // 3), "code_dim": bits // 3, "num_codes": 8 ** (bits // 3),
        "l2_normalize": False, "revival_steps": 0,
    },
    "lfq": lambda codes, bits: {
        "kind": "lfq", "code_dim": bits, "l2_normalize": False, "entropy_weight": 0.1, "revival_steps": 0,
    },
    "bsq": lambda codes, bits: {"kind": "lfq", "code_dim": bits, "entropy_weight": 0.1, "revival_steps": 0},
    "residual": lambda codes, bits: {"l2_normalize": False, "depth": 3, "num_codes": 2 ** (bits // 3)},
    "grouped": lambda codes, bits: {
        "l2_normalize": False, "groups": 3, "code_dim": 9, "num_codes": 2 ** (bits // 3)
    },
}  # fmt: skip
# Run length and cadence: steps, batch, and how often to log, evaluate and save.
RUNS = {
    "test": {"res": 16, "steps": 8, "batch_size": 8, "log": 2, "evaluate": 4, "save": 2},
    "emoji": {"res": 32, "steps": 400, "batch_size": 32, "log": 20, "evaluate": 200, "save": 200},
    # 40 epochs of ImageNet at batch 128.
    "vq16": {"res": 256, "steps": 400_000, "batch_size": 128, "log": 100, "evaluate": 5_000, "save": 2_500},
    "vq8": {"res": 256, "steps": 400_000, "batch_size": 128, "log": 100, "evaluate": 5_000, "save": 2_500},
}
IMAGENET = 1_281_167  # pictures of an epoch


def _steps(epochs: int, batch_size: int) -> int:
    """Steps of so many epochs of ImageNet."""
    return epochs * IMAGENET // batch_size


# What IBQ and Open-MAGVIT2 share: their discriminator judges for the generator only after its own step.
_VOKEN = {
    "batch_size": 256, "eval_batch_size": 256, "ema_decay": 0.9999,
    "model.encoder_blocks": 4, "model.decoder_blocks": 5,
    "loss.l1": 1.0, "loss.l2": 0.0, "loss.lpips": 1.0, "loss.gan": 0.1, "loss.gan_kind": "non_saturating_hinge",
    "loss.gan_start": 0, "loss.adaptive": False, "loss.discriminator_first": True, "loss.lecam": 0.05,
    "model.quantizer.l2_normalize": False, "model.quantizer.entropy_temperature": 0.01,
}  # fmt: skip
# Recipe -> (size it starts from, what differs), and of both optimizers. Numbers that the papers leave open are those of
# the published configs of the systems.
RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llamagen_vq16": ("vq16", {"steps": _steps(40, 128)}, {}),
    "ibq_16k": (
        "vq16",
        {
            **_VOKEN, "steps": _steps(330, 256), "model.quantizer.kind": "ibq", "model.quantizer.code_dim": 256,
            "model.quantizer.index_weight": 1.0, "model.quantizer.commitment_weight": 1.0,
            "model.quantizer.codebook_weight": 0.25, "model.quantizer.entropy_weight": 0.05,
        },
        {"b1": 0.5, "b2": 0.9, "clip_norm": 0.0, "schedule": "drops", "drop_factor": 0.1,
         "drops": (_steps(250, 256), _steps(300, 256))},
    ),
    "open_magvit2": (
        "vq16",
        {
            **_VOKEN, "steps": _steps(270, 256), "model.attention_levels": (), "model.mid_attention": False,
            "model.z_channels": 18, "model.quant_conv": False, "model.quantizer.kind": "lfq",
            "model.quantizer.code_dim": 18, "model.quantizer.num_codes": 2**18,
            "model.quantizer.commitment_weight": 0.25, "model.quantizer.entropy_weight": 0.1,
        },
        {"b1": 0.5, "b2": 0.9, "clip_norm": 0.0},
    ),
    # Its code swaps the weights of commitment and codebook: beta = 0.25 is that of the codebook.
    "vqgan_f16": (
        "vq16",
        {
            "steps": 500_000, "model.quantizer.code_dim": 256, "model.quantizer.l2_normalize": False,
            "model.quantizer.commitment_weight": 1.0, "model.quantizer.codebook_weight": 0.25, "loss.l1": 1.0,
            "loss.l2": 0.0, "loss.gan": 0.8, "loss.gan_start": 250_001, "loss.adaptive": True, "ema_decay": 0.0,
        },
        {"b1": 0.5, "b2": 0.9, "clip_norm": 0.0, "lr": 4.5e-6 * 128},  # 4.5e-6 for each picture of a batch
    ),
}  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of a size or recipe; `res` = 0 takes the size's own resolution, `quantizer` = "" its own."""
    args = parse_arg(arg, size="emoji", res=0, recipe="", quantizer="")
    changes: dict[str, Any] = {}
    of_optimizers: dict[str, Any] = {}
    if args.recipe:
        args.size, changes, of_optimizers = choose("recipe", args.recipe, RECIPES)
    run = choose("size", args.size, RUNS)
    small = args.size in ("test", "emoji")
    res = args.res or run["res"]
    config: Any = ConfigDict()
    config.task = "tokenizer"  # what is trained: "tokenizer", "decoder", or your own module that has a TASK
    config.seed = 0  # seed of everything random: first parameters, order of the data, random ops, dropout, samples
    config.res = res  # side of the training images in pixels; data and ops below follow it
    config.steps = run["steps"]  # optimizer steps of the whole run
    config.batch_size = run["batch_size"]  # examples per optimizer step, over all devices and micro-batches together
    # Micro-batches of a step: gradient accumulation, to save memory. The discriminator sees the difference: its
    # batch norm takes the statistics of a part, and so does the adaptive weight.
    config.accumulate = 1
    config.eval_batch_size = 64 if small else run["batch_size"]  # examples per evaluation batch, all devices together
    config.mesh = {
        "data": -1,  # data parallelism: devices, or slices, with a whole copy of the parameters each; -1 = all left
        "fsdp": 1,  # devices that parameters, gradients, optimizer state and batch are sharded over; -1 = all left
        "tensor": 1,  # tensor parallelism: devices that heads, mlp, vocabulary and codebook are sharded over
    }
    # Options of XLA's compiler for the training step: "xla_name=value,xla_name=value"; other platforms' are left out.
    # This one saves CPUs a copy of the optimizer's state in each step.
    config.compiler_options = "xla_cpu_copy_insertion_use_region_analysis=true"
    config.topology = (
        "" if small else "v5e-16"
    )  # what mesh and batch were chosen for; read by tools/scale/compile_ahead.py alone

    # --- Data: where from, and what is done to a picture, in order.
    cut = f"flip_lr|resize_small({res})|random_crop({res})" if small else f"random_resized_crop({res})|flip_lr"
    config.data = {
        # Training data: emoji:SPLIT, folder:PATH, array_record:PATH, tfds:NAME,split=S, tokens:PATH, or a weighted
        # mixture of several, "0.7*A + 0.3*B".
        "train": f"emoji:train,res={res}" if small else "tfds:imagenet2012,split=train",
        # Data of the evaluations, written in the same way; never trained on. "" = the set's own, or a share of `train`.
        "validation": "" if small else "tfds:imagenet2012,split=validation",
        "validation_share": 0.05,  # that share, chosen by name, see imagegpt_jax/data/holdout.py
        # Preprocessing of training images: ops separated by "|", applied from left to right.
        "train_ops": f"decode|{cut}|value_range(-1,1)",
        # Preprocessing of validation images; nothing in it is random.
        "eval_ops": f"decode|resize_small({res})|central_crop({res})|value_range(-1,1)",
        # Bad records are left out and listed in quarantine.jsonl, see imagegpt_jax/data/quarantine.py.
        "quarantine": {
            "max_share": 0.1,  # the run stops when a larger share of the records is bad
            "accept": (),  # kinds to take nevertheless: "cmyk", "16-bit", "animated", "extension", "thin"
        },
    }

    # --- Networks.
    config.model = {
        "in_channels": 3,
        "out_channels": 0,
        **MODELS[args.size],
        "attention_heads": 1,
        "mid_blocks": 2,
        "double_latent": False,
        "quant_conv": True,
        "plain_blocks": False,
        "spatial_norm": False,
        "frames": 0,
        "unit_pixels": False,
        "decoder": True,
        "logit_laplace": False,
        "conv_impl": "auto",
        "remat": False,
        "dtype": "float32" if small else "bfloat16",
        "param_dtype": "float32",
        "quantizer": {
            "kind": "vq",
            **QUANTIZERS[args.size],
            "groups": 1,
            "depth": 1,
            "levels": (),
            "l2_normalize": True,
            "codebook_update": "gradient",
            "codebook_decay": 0.99,
            "commitment_weight": 0.25,
            "codebook_weight": 1.0,
            "index_weight": 0.0,
            "entropy_weight": 0.0,
            "entropy_temperature": 0.01,
            "chunk_codes": 16384,
        },
    }
    config.discriminator = {
        "kind": "patch",
        "in_channels": 3,
        "base_width": 16 if small else 64,
        "num_layers": 2 if small else 3,
        "norm": "batch",
        "norm_groups": 8,
        "max_width": 512,
        "image_size": res,
        "deviation_group": 4,
        "dtype": "float32" if small else "bfloat16",
        "param_dtype": "float32",
    }
    config.frozen = ()  # regular expressions: parameters whose path one of them is found in are not trained

    # --- Losses. The demo is scored by PSNR, so it leaves the discriminator out: gan_start = -1 is "never".
    config.loss = {
        "l1": 0.0,
        "l2": 1.0,
        "logit_laplace": 0.0,
        "lpips": 0.0 if small else 1.0,
        "lpips_weights": "",
        "gan": 0.5,
        "gan_kind": "hinge",
        "gan_start": {"test": 4, "emoji": -1}.get(args.size, 20_000),
        "adaptive": args.size == "test",
        "discriminator_first": False,
        "lecam": 0.0,
        "lecam_decay": 0.999,
        "r1": 0.0,
        "others": "",  # of your own: "0.5*my_package.losses:charbonnier"
    }

    # --- Optimizers.
    config.optim = {
        "name": "muon" if args.size == "emoji" else "adam",
        "lr": 4e-3 if args.size == "emoji" else 1e-4,
        "schedule": "cosine" if small else "constant",
        "warmup_steps": 20 if args.size == "emoji" else 0,
        "decay_start": 0,
        "final_lr_ratio": 0.01,
        "drops": (),
        "drop_factor": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "mu_dtype": "float32",
        "nu_dtype": "float32",
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    config.discriminator_optim = {**config.optim, "name": "adam"}
    config.ema_decay = (
        0.99 if small else 0.999
    )  # decay of the moving average (EMA) of parameters that is evaluated; 0 = off

    # --- Cadence, in steps.
    config.log_every = run["log"]  # steps between lines of metrics.jsonl and points in TensorBoard
    config.eval_every = run["evaluate"]  # steps between evaluations on data.validation
    # Network by whose features reconstructions are also compared as sets: "" = none, "efficientnet_lite0" (KID,
    # offline), or "inception=pt_inception-2015-12-05-6726825d.pth" (rFID and KID).
    config.eval_features = ""
    config.checkpoint = {
        "every": run["save"],  # steps between checkpoints; the last step is always saved
        "keep": 0 if small else 3,  # how many of the newest checkpoints stay; 0 = all
        "keep_every_hours": 0.0,  # besides, one checkpoint of every so many hours stays; 0 = none
        "keep_best": "",  # besides, the one with the highest of this validation score, or lowest: "-validation/loss"
    }

    # --- What to do about steps that go wrong, see imagegpt_jax/training/step_guard.py.
    config.guard = {
        "spike": 0.0,  # skip an update whose loss is so many standard deviations above its running mean; 0 = never
        "window": 100,  # steps of that running mean, of which the first ones are not judged
        "patience": 10,  # after so many bad steps in a row, return to the last checkpoint; 0 = never
        "max_rollbacks": 3,  # after so many returns the run stops with an error
    }

    # --- Fine-tuning: workdir of a run, or published weights, whose parameters this run begins with; "" = random ones.
    config.init_from = ""
    config.init_partial = False  # whether to take the parameters that fit where some do not, and list the others

    # --- Recipe and quantizer: what differs from the size.
    config.update_from_flattened_dict(changes)
    config.optim.update(of_optimizers)
    config.discriminator_optim.update(of_optimizers)
    if args.quantizer:
        quantizer = config["model"].quantizer
        kind = choose("quantizer", args.quantizer, QUANTIZER_KINDS)
        quantizer.update(kind(quantizer.num_codes, quantizer.num_codes.bit_length() - 1))
    return config
