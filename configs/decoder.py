"""Stage 2, the decoder over text and image tokens: `--config=configs/decoder.py:size=emoji[,res=32]`, `:recipe=rar_B`.

Sizes:
  test             seconds on a laptop: for tests; encodes images with an untrained tokenizer
  emoji            the demo: captions to 32 px emoji on two CPU cores
  B L XL XXL 3B    LlamaGen's class-conditional shapes (arXiv:2406.06525): ImageNet at 256 px, 256 codes of 16384
  7B               LlamaGen's largest text-conditional shape, on classes like the others
  20B              text to image after Parti (arXiv:2206.10789): 128 words, 1024 codes of 8192, Adafactor. Parti is an
                   encoder-decoder; this is a decoder of about its size

Recipes, published systems with all their numbers (`recipes.py`):
  llamagen_B L XL XXL 3B   LlamaGen (arXiv:2406.06525), 300 epochs on ten crops
  llamagen_t2i_XL XL_512 1B 7B   LlamaGen over words: 120 features of a text encoder before the picture
  rar_B L XL XXL           RAR (arXiv:2411.00776): random order annealed to raster, adaptive norm, 1024 codes
  imagegpt_S M L           ImageGPT (Chen et al. 2020): 32 px pictures as 1024 of 512 colours
  after_dalle_mini         decoder with DALL-E mini's width, codes, text length and Distributed Shampoo
  after_parti_20b          decoder with Parti's width, codes, text length and Adafactor
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from imagegpt_jax.config import choose, parse_arg, sibling

# Of models.gpt_config.GPTConfig.
MODELS = {
    "test": {"depth": 2, "heads": 2, "width": 32, "mlp_width": 64},
    "emoji": {"depth": 5, "heads": 4, "width": 256, "mlp_width": 704},
    "B": {"depth": 12, "heads": 12, "width": 768, "mlp_width": 2048},
    "L": {"depth": 24, "heads": 16, "width": 1024, "mlp_width": 2816},
    "XL": {"depth": 36, "heads": 20, "width": 1280, "mlp_width": 3584},
    "XXL": {"depth": 48, "heads": 24, "width": 1536, "mlp_width": 4096},
    "3B": {"depth": 24, "heads": 32, "width": 3200, "mlp_width": 8704},
    "7B": {"depth": 32, "heads": 32, "width": 4096, "mlp_width": 11008},
    "20B": {"depth": 64, "heads": 40, "width": 5120, "mlp_width": 13824},
}
# Tokenizer size, resolution, run length and cadence of the small sizes.
RUNS = {
    "test": {"tokenizer": "test", "res": 16, "steps": 8, "batch_size": 8, "log": 2, "evaluate": 4, "save": 2},
    "emoji": {"tokenizer": "emoji", "res": 32, "steps": 330, "batch_size": 32, "log": 10, "evaluate": 165, "save": 165},
}
# The slice that each size is laid out for, and what its backward pass recomputes there; on any other, `fsdp` fills.
TOPOLOGIES = {
    "B": ("v5e-16", "dots"),
    "L": ("v5e-16", "full"),
    "XL": ("v5e-16", "full"),
    "XXL": ("v4-128", "full"),
    "3B": ("v5e-256", "full"),
    "7B": ("v5p-128", "full"),
    "20B": ("v5p-512", "full"),
}
# 300 epochs of ImageNet at batch 256.
LLAMAGEN = {"tokenizer": "vq16", "res": 256, "steps": 1_500_000, "batch_size": 256, "log": 100, "evaluate": 10_000,
            "save": 5_000}  # fmt: skip
PARTI = {"tokenizer": "vq16", "res": 512, "steps": 450_000, "batch_size": 8192, "log": 100, "evaluate": 5_000,
         "save": 2_500}  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of a size or a recipe; `res` = 0 takes the size's own resolution."""
    args = parse_arg(arg, size="emoji", res=0, recipe="")
    if args.recipe:
        return _of_recipe(args.recipe, args.res)
    model = choose("size", args.size, MODELS)
    run = {"20B": PARTI, **RUNS}.get(args.size, LLAMAGEN)
    small = args.size in RUNS
    classes = run is LLAMAGEN  # else captions
    topology, remat = TOPOLOGIES.get(args.size, ("", "none"))
    res = args.res or run["res"]
    config: Any = ConfigDict()
    config.task = "decoder"
    config.seed = 0
    config.steps = run["steps"]
    config.batch_size = run["batch_size"]
    config.eval_batch_size = run["batch_size"]
    config.accumulate = 1  # micro-batches of a step: gradient accumulation, to save memory
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1} if small else {"data": 1, "fsdp": -1, "tensor": 1}
    # Options of XLA's compiler for the training step: "xla_name=value,xla_name=value"; other platforms' are left out.
    # This one saves CPUs a copy of the optimizer's state in each step.
    config.compiler_options = "xla_cpu_copy_insertion_use_region_analysis=true"
    config.topology = topology  # what mesh, batch and remat were chosen for; read by tools/scale/compile_ahead.py alone

    # --- Image tokenizer: workdir of stage 1, or published weights. "untrained" is one drawn with `seed`, of the shape
    # below: its codes are noise, good for tests. "" is none: token shards can be trained on, nothing can be drawn.
    config.tokenizer = "untrained" if args.size == "test" else ""
    config.untrained_tokenizer = sibling(__file__, "tokenizer.py").get_config(f"size={run['tokenizer']},res={res}")
    if args.size == "20B":
        config.untrained_tokenizer.model.quantizer.num_codes = 8192
    downsample = {"test": 4, "emoji": 4, "vq16": 16}[run["tokenizer"]]

    # --- Text encoder: folder of a frozen language model (GPT-2, Llama, portable), whose hidden states of a prompt are
    # prepended to the image tokens; "" = text tokens are part of the sequence.
    config.text_encoder = ""

    source = "tfds:imagenet2012,split=" if classes else "tfds:coco_captions,split="
    # --- Data: images that are encoded within the step, or `tokens:DIR` made by `imagegpt-jax encode`. What is None, a
    # placeholder, a new run takes from the data and keeps in its config.json.
    config.data = {
        "train": f"emoji:train,res={res}" if small else source + "train",
        "validation": "" if small else source + "validation",  # "" = the set's own, or a share of `train`
        "validation_share": 0.05,  # that share, chosen by name, see imagegpt_jax/data/holdout.py
        "train_ops": config.untrained_tokenizer.data.eval_ops,
        "eval_ops": config.untrained_tokenizer.data.eval_ops,
        "grid": (res // downsample, res // downsample),  # rows and columns of the codes of an image
        # Class-conditional: whether the class is a token before the text; None = if the data have classes, no captions.
        "use_labels": placeholder(bool) if small else classes,
        # Number of classes; None and 0 = as many as the data have.
        "num_classes": placeholder(int) if small else 1000 if classes else 0,
        "vocab_multiple": 1 if small else 128,  # rows are added to the token table to fill a multiple of this
        "text_tokenizer": "",  # folder of a text tokenizer; "" trains one on the captions of `train`
        # At most so many ids of the text tokenizer that is trained; 0 = no text.
        "text_vocab_size": {"test": 1024, "emoji": 4096, "20B": 16384}.get(args.size, 0),
        "text_tokenizer_examples": 100_000,  # captions that the text tokenizer is trained on
        # Length of the text region, or with a text encoder number of its features; longer captions are cut. None = as
        # the longest caption of `train` needs, up to `max_text_length`.
        "text_length": placeholder(int) if small else 1 if classes else 128,
        "max_text_length": 12 if args.size == "test" else 128,  # the longest that None becomes
        "text_weight": 0.0 if classes else 0.1,  # loss weight of text tokens
        "image_weight": 1.0,  # loss weight of image tokens
        "guidance_dropout": 0.1,  # share of sequences without their text, for classifier-free guidance
        "image_to_text": 0.0,  # share of sequences turned around: captioning
        # Any-order training (RAR, arXiv:2411.00776).
        "order": {
            "random_until": 0,  # step until which all images have their codes in random order; 0 = raster order
            "raster_from": 0,  # step from which all have raster order; between the two a falling share is random
        },
        "quarantine": {"max_share": 0.1, "accept": ()},  # bad records, see imagegpt_jax/data/quarantine.py
    }

    # --- Network.
    config.model = {
        **model,
        "kv_heads": 0,
        "head_dim": 0,
        "norm": "rms",
        "norm_eps": 1e-5,
        "mlp": "swiglu",
        "activation": "",
        "bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_scale": 0.0,
        "attention_scale_by_layer": False,
        "position": "rope",
        "rope_theta": 10000.0,
        "rotary_dims": (),
        "rope_scaling": {"kind": "default"},
        "rope_zero_prefix": False,
        "max_length": 0,
        "qk_norm": small,
        "tie_embeddings": False,
        "head_size": 0,
        "token_dropout": 0.1 if classes else 0.0,
        "residual_dropout": 0.1 if classes else 0.0,
        "mlp_dropout": 0.1 if classes else 0.0,
        "attention_dropout": 0.0,
        "target_positions": False,
        "feature_width": 0,  # 0 = as the text encoder, if there is one
        "feature_length": 0,  # 0 = data.text_length, if there is one
        "feature_begins": False,
        "conditioning": "prefix",
        "attention": "auto",
        "remat": remat,
        "scan": not small,
        "dtype": "float32" if small else "bfloat16",
        "param_dtype": "float32",
    }
    config.logit_chunk = (
        8192 if small else 4096
    )  # ids of the vocabulary scored at a time, which bounds the memory of the loss
    config.frozen = ()  # regular expressions: parameters whose path one of them is found in are not trained

    # --- Optimizer.
    config.optim = {
        "name": {"emoji": "muon", "20B": "adafactor"}.get(args.size, "adamw"),
        "lr": {"emoji": 4e-3, "20B": 4.5e-5}.get(args.size, 1e-4),
        "schedule": "constant" if classes else "cosine",
        "warmup_steps": {"emoji": 20, "20B": 5000}.get(args.size, 0),
        "decay_start": 0,
        "final_lr_ratio": 0.05,
        "drops": (),
        "drop_factor": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "mu_dtype": "bfloat16" if args.size == "20B" else "float32",
        "nu_dtype": "float32",
        "weight_decay": 0.045 if args.size == "20B" else 0.05,
        "clip_norm": 4.0 if args.size == "20B" else 1.0,
    }
    config.ema_decay = (
        0.99 if small else 0.0
    )  # decay of the moving average (EMA) of parameters that samples come from; 0 = off

    # --- Sampling: defaults of the sampling binary and of evaluations.
    config.sampling = {
        "temperature": 0.7 if args.size == "emoji" else 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "cfg_scale": 3.0 if small else 2.0,
        "cfg_schedule": "constant",
        "cfg_power": 1.0,
    }
    # Prompts of the samples that every evaluation draws for TensorBoard; () = none, None = two captions of the
    # validation split, or classes.
    config.sample_prompts = placeholder(tuple) if small else ()

    # --- Cadence, in steps.
    config.log_every = run["log"]
    config.eval_every = run["evaluate"]
    config.eval_samples = 0  # samples of validation prompts that every evaluation generates and scores; 0 = none
    # Networks by whose features those are scored, with commas between them: "efficientnet_lite0" (KID, offline),
    # "inception=pt_inception-2015-12-05-6726825d.pth" (FID, KID), "clip=FOLDER" (CLIPScore).
    config.eval_features = "efficientnet_lite0"
    config.checkpoint = {"every": run["save"], "keep": 0 if small else 3, "keep_every_hours": 0.0, "keep_best": ""}

    # --- What to do about steps that go wrong, see imagegpt_jax/training/step_guard.py.
    config.guard = {"spike": 0.0, "window": 100, "patience": 10, "max_rollbacks": 3}

    # --- A run whose parameters this one begins with; init_partial allows that some do not fit.
    config.init_from = ""
    config.init_partial = False
    return config


def _of_recipe(name: str, res: int) -> ConfigDict:
    """The config of the size that a recipe starts from, with what differs."""
    recipe = choose("recipe", name, sibling(__file__, "recipes.py").RECIPES)
    config: Any = get_config(f"size={recipe.size},res={res or recipe.res}")
    of_tokenizer = f"{recipe.tokenizer},res={res or recipe.res}"
    config.untrained_tokenizer = sibling(__file__, "tokenizer.py").get_config(of_tokenizer)
    config.untrained_tokenizer.update_from_flattened_dict(recipe.tokenizer_changes)
    side = (res or recipe.res) // recipe.downsample
    config.data.grid = (side, side)
    for split in ("train_ops", "eval_ops"):
        config.data[split] = config.untrained_tokenizer.data.eval_ops
    config.update_from_flattened_dict(recipe.changes)
    return config
