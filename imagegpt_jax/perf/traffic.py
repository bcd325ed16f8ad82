"""Bytes that a compiled TPU program moves between HBM and the chip, and sizes of its arrays, from its HLO text.

`cost_analysis()` counts what is fetched into VMEM ahead of its use twice: once as it is fetched, once as it is used.
Here only what lies in HBM counts: a layout says `S(1)` for what lies in VMEM, `S(2)` for semaphores and so on, and
nothing for HBM.
"""

import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}  # fmt: skip
ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
LINE = re.compile(r"^\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>.+?) (?P<op>[a-z][a-z0-9\-]*)\((?P<rest>.*)$")
# The source of a copy, and whether the run before may have made it.
COPY = re.compile(r"copy-start\(%([^\s,()]+)\)(, cross_program_prefetch_index)?")
# These move nothing: names for what is there, or the end of what has begun elsewhere.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "copy-done", "slice-done",
        "async-done")  # fmt: skip

Value = list[tuple[int, bool]]  # of each array of a value: bytes, and whether it lies in HBM


def hbm_bytes(text: str) -> int:
    """Bytes that the entry computation of an optimized HLO module reads from HBM and writes to it.

    An update in place counts what is written alone. What a program fetches at its end for its next run counts there,
    and not at its beginning (a cross-program prefetch, which then finds it in place).

    Args:
      text: `compiled.as_text()` of a TPU program without loops.
    """
    entry = text[text.index("\nENTRY ") :]
    renewed = {source for source, early in COPY.findall(entry) if not early}
    values: dict[str, Value] = {}
    total = 0
    for line in entry[: entry.index("\n}")].splitlines():
        match = LINE.match(line)
        if not match:
            continue
        name, op, rest = match["name"], match["op"], match["rest"]
        value = arrays(match["type"])
        operands = [values.get(found, []) for found in re.findall(r"%([^\s,()]+)", rest.split("), ", 1)[0])]
        if op == "get-tuple-element":
            index = re.search(r"index=(\d+)", rest)
            value = [operands[0][int(index[1])]] if operands and operands[0] and index else value
        elif op in ("copy-start", "slice-start", "async-start"):
            # (destination, source, ...) or ((source), destination, ...): what is moved is as large as the destination.
            if (copy := COPY.search(line)) and copy[2] and copy[1] in renewed:
                values[name] = value
                continue
            moved = value[0] if op == "copy-start" else value[1]
            source = operands[0][0] if operands and operands[0] else (0, True)
            total += moved[0] * (source[1] + moved[1])
        elif op == "dynamic-update-slice":
            total += operands[1][0][0] * (operands[1][0][1] + value[0][1])
        elif op == "custom-call" and "ConcatBitcast" in rest:
            pass
        elif op not in FREE:
            total += sum(size for operand in [*operands, value] for size, hbm in operand if hbm)
        values[name] = value
    return total


def arrays(type_text: str) -> Value:
    """The arrays of a type, in order; tuples are flattened."""
    found = []
    for kind, dims, layout in ARRAY.findall(type_text):
        if kind in BYTES:
            size = BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
            found.append((size, not re.search(r"S\([1-9]", layout or "")))
    return found


def largest(text: str, kind: str) -> int:
    """Bytes of the largest array of a type, such as "f32", anywhere in an HLO module.

    Args:
      text: `compiled.as_text()`.
      kind: name of the type in HLO.
    """
    sizes = (math.prod(dims) for name, dims in _shapes(text) if name == kind)
    return BYTES[kind] * max(sizes, default=0)


def largest_square(text: str, length: int) -> int:
    """Bytes of the largest array with two dimensions of a sequence's length: scores or masks of attention.

    Args:
      text: `compiled.as_text()`.
      length: tokens of a sequence; one less, and the next multiple of 128, count as well.
    """
    lengths = length - 1, length, -(-length // 128) * 128
    squares = (BYTES[name] * math.prod(dims) for name, dims in _shapes(text) if sum(d in lengths for d in dims) > 1)
    return max(squares, default=0)


def _shapes(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """(type, dimensions) of all arrays of a module."""
    found = {(name, dims) for name, dims, _ in ARRAY.findall(text) if name in BYTES and dims}
    return {(name, tuple(map(int, dims.split(",")))) for name, dims in found}
