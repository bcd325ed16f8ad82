"""How fast a decoder's step can be that takes its products from the libraries which `benchmark.py train` compares.

Its products with matrices, each timed alone, forward and for both gradients, in the faster library; those of attention,
at the rate of the GEMM; and one pass of AdamW over memory, which reads parameters, gradients and two moments and writes
all but the gradients, at the rate of adding two arrays into a third. Nothing for norms, activations, softmax or loss.

And how fast one would be that is put together from the libraries' fastest pieces: the same products and optimizer, and
attention, norms, activations and loss as they are, forward and backward, each timed alone in the faster library.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PRODUCTS = 3  # of a matrix: forward, and the gradients of its input and of itself
PASSES = 7  # over arrays of the parameters' size, of AdamW


def matrices(config: Any) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many of them) of a decoder's matrices: those of its blocks, and its head."""
    model, codes = config.model, config.untrained_tokenizer.model.quantizer.num_codes
    width, hidden, depth = model.width, model.mlp_width, model.depth
    return [(width, width, 4 * depth), (width, hidden, 2 * depth), (hidden, width, depth), (width, codes, 1)]


def floor(
    readings: Mapping[str, Sequence[Mapping[str, Any]]],
    rate: float,
    tokens: int,
    sizes: Sequence[tuple[int, int, int]],
    others: Mapping[str, tuple[Any, int]],
    numbers: int,
) -> dict[str, Any]:
    """The least seconds of a step, by its parts.

    Args:
      readings: side -> what each of its processes printed. Each has "product_seconds", three for each of `sizes`,
        "piece_seconds", one for each of `others`, and "stream_seconds".
      rate: FLOP/s of products, for attention's.
      tokens: of a step.
      sizes: `matrices`.
      others: `benchmark_pieces.shapes`.
      numbers: of each array in "stream_seconds".

    Returns:
      {"products", "attention", "optimizer", "seconds" of all three, "pieces": name -> seconds of all of its kind,
      "assembled": seconds of products, optimizer and pieces}
    """
    runs = [run for side in readings.values() for run in side]

    def fastest(name: str) -> list[float]:
        sides = [
            [statistics.median(times) for times in zip(*(run[name] for run in side), strict=True)]
            for side in readings.values()
        ]
        return [min(times) for times in zip(*sides, strict=True)]

    counts = [count for _, _, count in sizes for _ in range(PRODUCTS)]
    flops = 2 * PRODUCTS * tokens * sum(inputs * outputs * count for inputs, outputs, count in sizes)
    stream = min(statistics.median(run["stream_seconds"] for run in side) for side in readings.values())
    parts = {
        "products": sum(count * seconds for count, seconds in zip(counts, fastest("product_seconds"), strict=True)),
        "attention": (runs[0]["model_flops"] - flops) / rate,
        "optimizer": PASSES * runs[0]["parameters"] * stream / (3 * numbers),
    }
    timed = zip(others.items(), fastest("piece_seconds"), strict=True)
    rest = {name: count * seconds for (name, (_, count)), seconds in timed}
    assembled = parts["products"] + parts["optimizer"] + sum(rest.values())
    return {**parts, "seconds": sum(parts.values()), "pieces": rest, "assembled": assembled}


def text(workload: str, summary: Mapping[str, Any]) -> str:
    """The "floor" of a summary in two sentences."""
    least = summary["floor"]

    def seconds(name: str, parts: Mapping[str, float]) -> str:
        ratio = f"; PyTorch / that {summary['torch']['seconds'] / least[name]:.2f}" if "torch" in summary else ""
        return f"{least[name]:.3f} s ({', '.join(f'{part} {time:.3f}' for part, time in parts.items())}){ratio}"

    bound = {part: least[part] for part in ("products", "attention", "optimizer")}
    return (
        f"Floor of the {workload}'s step: {seconds('seconds', bound)}. The same products and optimizer, and the fastest"
        f" of the two libraries' other pieces: {seconds('assembled', least['pieces'])}."
    )
