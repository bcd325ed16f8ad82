"""Decoders of shapes for which compiled memory of MaxText 0.2.5 is known: `--config=configs/reference.py:size=2.9B`.

For comparison only (docs/scale.md): 16384 ids, sequences of 1280, four a device, fp32 parameters and moments, bf16
compute, remat full. Ours scores words against words and codes against codes: half the products in its output head.

Sizes: 2.9B (24 x 3072), 3.1B (24 x 3200), 20B (64 x 5120).
"""

from typing import Any

from ml_collections import ConfigDict

from imagegpt_jax.config import choose, parse_arg, sibling

# Percent of memory that the order of operations may take: with more, gathers that run ahead take 0.1 GiB more.
TIGHT = "xla_tpu_scheduler_percent_shared_memory_limit=12"
# Shape, slice, mesh and devices of the known figure.
SIZES = {
    "2.9B": ({"depth": 24, "width": 3072, "heads": 24, "mlp_width": 8704}, "v5e-256", {"fsdp": 256}, 256),
    "3.1B": ({"depth": 24, "width": 3200, "heads": 25, "mlp_width": 8704}, "v5e-256", {"data": 2, "fsdp": 128}, 256),
    "20B": ({"depth": 64, "width": 5120, "heads": 40, "mlp_width": 13824}, "v5p-512", {"fsdp": 256}, 256),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of a size; `tensor` of the devices are taken from `fsdp`."""
    args = parse_arg(arg, size="2.9B", tensor=1)
    model, topology, mesh, devices = choose("size", args.size, SIZES)
    config: Any = sibling(__file__, "decoder.py").get_config("size=20B")
    config.model.update(model)
    config.topology = topology
    config.mesh = {"data": 1, **mesh, "fsdp": mesh["fsdp"] // args.tensor, "tensor": args.tensor}
    config.batch_size = config.eval_batch_size = 4 * devices
    config.compiler_options = TIGHT if args.size == "3.1B" else ""
    config.data.text_length = 256
    config.data.text_vocab_size = 8188  # with 4 special ids and 8192 codes: 16384
    config.data.text_weight = 1.0
    config.optim.update({"name": "adamw", "mu_dtype": "float32", "nu_dtype": "float32"})
    return config
