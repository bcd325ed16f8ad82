"""PyTorch's side of `tools/benchmarks/benchmark.py train`: the same networks from `transformers`, and one line of JSON.

python tools/benchmarks/benchmark_torch.py --workload=decoder --size=test --seconds=1
"""

import importlib.metadata
import json
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import benchmark_floor
import benchmark_pieces
import benchmark_pieces_torch
import benchmark_workloads as workloads
from absl import flags

from imagegpt_jax import cli

WORKLOAD = flags.DEFINE_enum("workload", "decoder", workloads.WORKLOADS, "What to time.")
SIZE = flags.DEFINE_enum("size", "full", workloads.SIZES, "full, or tiny for tests.")
SECONDS = flags.DEFINE_float("seconds", 30.0, "Time steps for at least this long.", lower_bound=0.0)


def decoder(config: Any) -> tuple[Any, Callable[[], Any]]:
    """`LlamaForCausalLM` of the config's shape, and its loss on one batch of random codes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model, codes = config.model, config.untrained_tokenizer.model.quantizer.num_codes
    length = config.data.grid[0] * config.data.grid[1]
    shape = LlamaConfig(
        vocab_size=codes,
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        max_position_embeddings=length,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=False,
        use_cache=False,
    )
    network = LlamaForCausalLM(shape).train()
    network.set_attn_implementation("sdpa")
    ids = torch.randint(codes, (config.batch_size, length + 1))

    def loss() -> Any:
        logits = network(input_ids=ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return network, loss


def tokenizer(config: Any) -> tuple[Any, Callable[[], Any]]:
    """`JanusVQVAE` of the config's shape, and its squared error and codebook loss on one batch of random pictures."""
    import torch
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    model = config.model
    shape = JanusVQVAEConfig(
        base_channels=model.base_width,
        channel_multiplier=list(model.width_mults),
        num_res_blocks=model.encoder_blocks,
        latent_channels=model.z_channels,
        embed_dim=model.quantizer.code_dim,
        num_embeddings=model.quantizer.num_codes,
        num_patches=config.res >> (len(model.width_mults) - 1),
    )
    network = JanusVQVAE(shape).train()
    image = torch.rand(config.batch_size, 3, config.res, config.res) * 2 - 1

    def loss() -> Any:
        # JanusVQVAE.forward decodes from ids, past which no gradient goes to the encoder.
        quantized, codebook_loss, _ = network.quantize(network.quant_conv(network.encoder(image)))
        pixels = network.decoder(network.post_quant_conv(quantized))
        return torch.nn.functional.mse_loss(pixels, image) + codebook_loss

    return network, loss


def make_step(config: Any) -> tuple[Callable[[], float], dict[str, Any]]:
    """The training step of a config on one batch, over and over: (call that returns the loss, facts)."""
    import torch

    torch.manual_seed(0)
    network, loss_fn = {"decoder": decoder, "tokenizer": tokenizer}[config.task](config)
    optim = config.optim
    # Decay is for matrices, as in ours; `fused` is PyTorch's fastest.
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    vectors = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.b1, optim.b2), eps=optim.eps, fused=True)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
        optimizer.step()
        return loss.item()

    return call, {"parameters": sum(p.numel() for p in network.parameters())}


def gemm_seconds(side: int) -> list[float]:
    """Seconds of products of two square float32 matrices."""
    import torch

    a, b = torch.randn(side, side), torch.randn(side, side)

    def call() -> None:
        torch.mm(a, b)

    return workloads.timed(call, 0.0, fewest=5)["seconds"]


def product_seconds(tokens: int, matrices: Sequence[tuple[int, int, int]]) -> list[float]:
    """Seconds of each matrix's three products with `tokens` rows: forward, and the gradients of input and matrix."""
    import torch

    def timed(a: Any, b: Any) -> float:
        return statistics.median(workloads.timed(lambda: torch.mm(a, b), 0.0, fewest=9)["seconds"])

    seconds = []
    for inputs, outputs, _ in matrices:
        x, w, dy = torch.randn(tokens, inputs), torch.randn(inputs, outputs), torch.randn(tokens, outputs)
        seconds += [timed(x, w), timed(dy, w.T), timed(x.T, dy)]
    return seconds


def piece_seconds(shapes: Sequence[Sequence[tuple[int, ...]]]) -> list[float]:
    """Seconds of each of `benchmark_pieces_torch`, forward and backward, on inputs of its shapes."""
    import torch

    seconds = []
    for function, of_inputs in zip(benchmark_pieces_torch.pieces().values(), shapes, strict=True):
        inputs = [torch.randn(shape, requires_grad=True) for shape in of_inputs]
        seed = torch.ones_like(function(*inputs))

        def call(function: Callable[..., Any] = function, inputs: list[Any] = inputs, seed: Any = seed) -> None:
            torch.autograd.grad(function(*inputs), inputs, seed)

        seconds.append(statistics.median(workloads.timed(call, 0.0, fewest=9)["seconds"]))
    return seconds


def stream_seconds(numbers: int) -> float:
    """Seconds of adding two float32 arrays into a third."""
    import torch

    a, b, c = torch.ones(3, numbers)
    return statistics.median(workloads.timed(lambda: torch.add(a, b, out=c), 0.0, fewest=9)["seconds"])


def main() -> None:
    """Times the workload that the flags name."""
    import torch

    # Tiny steps are for tests: threads that wait for each other on busy processors take seconds for each.
    torch.set_num_threads(workloads.cores() if SIZE.value == "full" else 1)
    config = workloads.make_config(WORKLOAD.value, SIZE.value)
    call, facts = make_step(config)
    gemm = gemm_seconds(workloads.GEMM_SIDE[SIZE.value])
    measured = workloads.timed(call, SECONDS.value)
    gemm += gemm_seconds(workloads.GEMM_SIDE[SIZE.value])
    if WORKLOAD.value == "decoder":
        tokens = workloads.units_per_step("decoder", config)
        measured["product_seconds"] = product_seconds(tokens, benchmark_floor.matrices(config))
        measured["piece_seconds"] = piece_seconds([shapes for shapes, _ in benchmark_pieces.shapes(config).values()])
        measured["stream_seconds"] = stream_seconds(workloads.STREAM[SIZE.value])
    losses = measured.pop("results")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    print(json.dumps({**facts, **measured, "losses": losses, "gemm_seconds": gemm, "versions": versions}))


if __name__ == "__main__":
    os.environ["USE_TORCH"] = "1"  # a TensorFlow beside it is not to be loaded
    cli.run(main)
