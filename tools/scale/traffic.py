"""Bytes that a compiled TPU program moves between HBM and the chip, and sizes of its arrays, from its HLO text.

`cost_analysis()` counts what is fetched into VMEM ahead of its use twice: once as it is fetched, once as it is used.
Here only what lies in HBM counts.
"""

import re

from imagegpt_jax.perf import hlo

# The source of a copy, and whether the run before may have made it.
COPY = re.compile(r"copy-start\(%([^\s,()]+)\)(, cross_program_prefetch_index)?")
# These move nothing: names for what is there, or the end of what has begun elsewhere.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "copy-done", "slice-done",
        "async-done")  # fmt: skip


def hbm_bytes(text: str) -> int:
    """Bytes that the entry computation of an optimized HLO module reads from HBM and writes to it.

    An update in place counts what is written alone. What a program fetches at its end for its next run counts there,
    and not at its beginning (a cross-program prefetch, which then finds it in place).

    Args:
      text: `compiled.as_text()` of a TPU program without loops.
    """
    entry = text[text.index("\nENTRY ") :]
    renewed = {source for source, early in COPY.findall(entry) if not early}
    values: dict[str, list[hlo.Array]] = {}
    total = 0
    for line in entry[: entry.index("\n}")].splitlines():
        match = hlo.INSTRUCTION.match(line)
        if not match:
            continue
        name, result, op, rest = match.groups()
        value = hlo.arrays(result)
        operands = [values.get(operand, []) for operand in re.findall(r"%([^\s,()]+)", rest.split("), ", 1)[0])]
        if op == "get-tuple-element":
            index = re.search(r"index=(\d+)", rest)
            value = [operands[0][int(index[1])]] if operands and operands[0] and index else value
        elif op in ("copy-start", "slice-start", "async-start"):
            # (destination, source, ...) or ((source), destination, ...): what is moved is as large as the destination.
            if (copy := COPY.search(line)) and copy[2] and copy[1] in renewed:
                values[name] = value
                continue
            moved = value[0] if op == "copy-start" else value[1]
            from_hbm = operands[0][0].in_hbm if operands and operands[0] else True
            total += moved.bytes * (from_hbm + moved.in_hbm)
        elif op == "dynamic-update-slice":
            update = operands[1][0]
            total += update.bytes * (update.in_hbm + value[0].in_hbm)
        elif op == "custom-call" and "ConcatBitcast" in rest:
            pass
        elif op not in FREE:
            total += sum(array.bytes for operand in [*operands, value] for array in operand if array.in_hbm)
        values[name] = value
    return total


def largest(text: str, kind: str) -> int:
    """Bytes of the largest array of a type, such as "f32", anywhere in an HLO module.

    Args:
      text: `compiled.as_text()`.
      kind: name of the type in HLO.
    """
    return max((array.bytes for array in hlo.arrays(text) if array.kind == kind and array.dims), default=0)


def largest_square(text: str, length: int) -> int:
    """Bytes of the largest array with two dimensions of a sequence's length: scores or masks of attention.

    Args:
      text: `compiled.as_text()`.
      length: tokens of a sequence; one less, and the next multiple of 128, count as well.
    """
    lengths = length - 1, length, -(-length // 128) * 128
    squares = (a.bytes for a in hlo.arrays(text) if sum(d in lengths for d in a.dims) > 1)
    return max(squares, default=0)
