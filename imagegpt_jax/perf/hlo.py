"""Counts the communication of a compiled program from its HLO text: every collective, how often it runs, its bytes.

Bytes are what one device sends, on a ring: with n devices in a group, an all-gather of a result of R bytes and a
reduce-scatter of an operand of R bytes send R (n - 1) / n, an all-reduce twice that. On TPUs a reduce-scatter may stand
in the text as a fusion named all-reduce-scatter, and an asynchronous collective as several fusions that share its work.

What crosses slices goes through the hosts and is no collective in the text, but a `send` and a `recv` that name their
operation (`_xla_megascale_transfer_type`): a kind of its own, BETWEEN_SLICES, on a ring of the slices.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

BETWEEN_SLICES = "between-slices"
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", BETWEEN_SLICES)

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
# Name, type of the result, operation, and what follows its opening bracket.
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[subf]\d+|bf16|f8\w*)\[([\d,]*)\](\{[^}]*\})?")
_WIDTHS = {"pred": 1, "bf16": 2}
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
# How a transfer between slices names its operation and its slices: "{1,2}x{0:15}" is each of 16 chips of two slices,
# {{100000,200000},{100001,200001}} two groups of a chip on each of two.
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="?\{\{?([\d,]+)\}')
# A computation with one of these goes on with, or ends, what another one started.
_CONTINUES = re.compile(r'custom_call_target="AsyncCollective(?!Start")')


class Array(NamedTuple):
    """An array in a type, such as bf16[8,128]{1,0:T(8,128)S(1)}."""

    kind: str
    dims: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Its size."""
        width = _WIDTHS.get(self.kind) or (1 if self.kind.startswith("f8") else int(self.kind[1:]) / 8)
        return int(math.prod(self.dims) * width)

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in HBM: a layout says S(1) for VMEM, S(2) for semaphores and so on, and nothing for HBM."""
        return not re.search(r"S\([1-9]", self.layout)


def arrays(text: str) -> list[Array]:
    """The arrays of a type, or of a whole module, in order; tuples are flattened."""
    return [Array(kind, tuple(map(int, filter(None, dims.split(",")))), at) for kind, dims, at in _ARRAY.findall(text)]


@dataclasses.dataclass(frozen=True)
class Total:
    """Communication of one kind in a run of the program.

    Attributes:
      count: collectives, those of a loop as often as they run; several tensors in one count once.
      bytes: sent by one device.
    """

    count: int
    bytes: int


@dataclasses.dataclass
class _Computation:
    collectives: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    calls: list[str] = dataclasses.field(default_factory=list)
    loops: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    continues: bool = False
    bound: int = 1  # of a loop's condition: the constant that its counter, from 0 on, is compared with


def count(hlo: str) -> dict[str, Total]:
    """Kind -> total of all that an optimized module runs, of kinds that occur. Raises ValueError without an entry."""
    computations, entry = _parse(hlo)
    if entry is None:
        raise ValueError("the HLO text has no ENTRY computation")
    runs: collections.Counter[str] = collections.Counter()
    totals: dict[str, list[int]] = {}

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for called in computations[name].calls:
            visit(called, times)
        for condition, body in computations[name].loops:
            visit(body, times * computations[condition].bound)

    visit(entry, 1)
    for name, times in runs.items():
        computation = computations[name]
        for kind, size in () if computation.continues else computation.collectives:
            total = totals.setdefault(kind, [0, 0])
            total[0], total[1] = total[0] + times, total[1] + times * size
    return {kind: Total(*totals[kind]) for kind in KINDS if kind in totals}


def _parse(hlo: str) -> tuple[dict[str, _Computation], str | None]:
    computations: dict[str, _Computation] = {}
    entry, current = None, None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header and not line.startswith(" "):
            name = header[1]
            current = computations[name] = _Computation(continues=name.startswith("async_collective_fusion"))
            entry = name if line.startswith("ENTRY") else entry
            continue
        match = INSTRUCTION.match(line)
        if current is None or match is None:
            continue
        _, result, operation, rest = match.groups()
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            # Started asynchronously, the result is (operand, result, ...).
            sizes = [array.bytes for array in arrays(result)]
            size = sum(sizes) if kind == operation else max(sizes, default=0)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter-fusion"
            current.collectives.append(_sent(kind, size, _group(line)))
        elif operation == "send" and (transfer := _TRANSFER.search(line)):
            # The result is (payload, context, token).
            current.collectives.append((BETWEEN_SLICES, _crossing(transfer[1], arrays(result)[0].bytes, line)))
        current.continues |= bool(_CONTINUES.search(line))
        if operation == "constant" and result.startswith("s32[]"):
            current.bound = int(rest.split(")")[0])
        current.loops += _LOOP.findall(rest)
        current.calls += [
            target.strip().lstrip("%") for called in _CALLED.findall(rest) for target in called.split(",")
        ]
    return computations, entry


def _sent(kind: str, size: int, group: int) -> tuple[str, int]:
    """(kind, bytes that one device sends) of a collective with a result of `size` bytes."""
    share = (group - 1) / max(group, 1)
    if kind == "reduce-scatter":
        return kind, round(size * group * share)
    if kind == "reduce-scatter-fusion":  # its all-reduce has the operand's size
        return "reduce-scatter", round(size * share)
    if kind == "collective-permute":
        return kind, size
    return kind, round(size * share * (2 if kind == "all-reduce" else 1))


def _crossing(transfer: str, size: int, line: str) -> int:
    """Bytes that one device sends to other slices, of a payload of `size` bytes."""
    named = _SLICES.search(line)
    slices = named[1].count(",") + 1 if named else 2
    if transfer == "ALL_GATHER":  # of the payloads of all
        return size * (slices - 1)
    if transfer == "ONE_TO_ONE":
        return size
    return round(size * (slices - 1) / slices * (2 if transfer == "ALL_REDUCE" else 1))


def _group(line: str) -> int:
    """Devices in each group of a collective, from any of the three ways HLO writes `replica_groups`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", mesh[2]))
    return 2
