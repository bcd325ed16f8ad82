"""What `benchmark.py train` times: the two workloads, and the stopwatch. Imports neither JAX nor PyTorch.

Both sides take their shapes from here, so that they cannot drift apart.
"""

import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from imagegpt_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKLOADS = ("decoder", "tokenizer")
SIZES = ("full", "test")
GEMM_SIDE = {"full": 4096, "test": 256}
LR = 1e-4
STREAM = {"full": 1 << 26, "test": 1 << 10}  # numbers in each of the arrays that the memory's rate is taken with


def decoder_config(size: str) -> Any:
    """LlamaGen-B without its class token, in float32: 256 codes of 16384 after one mark, and every code is scored."""
    name = "B" if size == "full" else "test"
    config = config_lib.sibling(str(ROOT / "configs" / "x.py"), "decoder.py").get_config(f"size={name}")
    config.batch_size, config.steps = 4, 1000
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.data.grid = (16, 16) if size == "full" else (4, 4)
    config.data.update(use_labels=False, num_classes=0, text_vocab_size=0, text_length=0, vocab_multiple=1)
    config.data.update(guidance_dropout=0.0, image_weight=1.0)
    config.model.update(token_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0)
    config.model.update(remat="none", scan=False, dtype="float32", qk_norm=False)
    config.logit_chunk = 16384  # float32 scores of all ids are 67 MB, which is little here
    config.ema_decay, config.sample_prompts = 0.0, ()
    config.optim.update(name="adamw", lr=LR, schedule="constant", warmup_steps=0, clip_norm=1.0)
    return config


def tokenizer_config(size: str) -> Any:
    """LlamaGen VQ-16 at 128 px, the autoencoder alone, in float32; "test" is the same network, narrow and shallow."""
    full = size == "full"
    config = config_lib.sibling(str(ROOT / "configs" / "x.py"), "tokenizer.py").get_config(
        f"size=vq16,res={128 if full else 32}"
    )
    config.batch_size, config.steps = 2, 1000
    config.model.dtype = "float32"
    if not full:
        config.model.update(base_width=32, width_mults=(1, 2), attention_levels=(1,), z_channels=32)
        config.model.update(encoder_blocks=1, decoder_blocks=2)
        config.model.quantizer.num_codes = 64
    config.loss.update(lpips=0.0, gan_start=-1)
    config.ema_decay = 0.0
    config.optim.update(name="adam", lr=LR, schedule="constant", warmup_steps=0, clip_norm=1.0)
    return config


def make_config(workload: str, size: str) -> Any:
    """The config of a workload."""
    return {"decoder": decoder_config, "tokenizer": tokenizer_config}[workload](size)


def units_per_step(workload: str, config: Any) -> int:
    """Tokens or images of a step."""
    length = config.data.grid[0] * config.data.grid[1] if workload == "decoder" else 1
    return config.batch_size * length


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def timed(call: Callable[[], Any], at_least: float, fewest: int = 3, warm_up: int = 2) -> dict[str, Any]:
    """Calls again and again, and times each.

    Args:
      call: blocks until its work is done.
      at_least: seconds to go on for.
      fewest: calls, however long they take.
      warm_up: calls before the clock starts.

    Returns:
      {"seconds": of each call, "processor_seconds": of each call, all threads together, "results": all, warm-up too}
    """
    results = [call() for _ in range(warm_up)]
    seconds: list[float] = []
    processor: list[float] = []
    while len(seconds) < fewest or sum(seconds) < at_least:
        started, used = time.perf_counter(), time.process_time()
        results.append(call())
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return {"seconds": seconds, "processor_seconds": processor, "results": results}
