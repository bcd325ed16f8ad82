"""The engine of weight conversion: tables of rules between the names of two checkpoints, strict both ways.

A rule pairs names of a published checkpoint with names of ours and says how the arrays change on the way. Names are
templates: `{i}` stands for a number, `{part:q|k|v}` for one of the words, and what they matched is put into the names
on the other side. So one table serves to read and to write. Every source name must match exactly one rule and every
target be filled by exactly one, or it is an error that lists both sides (the idea of jax-ml/bonsai's tables).

Arrays are NumPy on the host; nothing is read before it is needed, and one rule's arrays are in memory at a time.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from imagegpt_jax.errors import UserError
from imagegpt_jax.weight_files.tensor import Shape, Tensor

# Targets that begin so are kept for the way back and are no parameters, such as counters of a published checkpoint.
CARRIED = "carried."
Arrays = list[np.ndarray]
# How many names an error lists of each side.
_SHOWN = 8
_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")


@dataclasses.dataclass(frozen=True)
class Change:
    """What happens to the arrays of a rule on the way.

    Attributes:
      load: arrays of the sources -> arrays of the targets.
      save: the inverse, to the last bit.
    """

    load: Callable[[Arrays], Arrays]
    save: Callable[[Arrays], Arrays]


SAME = Change(lambda arrays: arrays, lambda arrays: arrays)


def transpose(*order: int) -> Change:
    """Permutes dimensions, of each array."""
    back = tuple(np.argsort(order))
    return Change(lambda xs: [x.transpose(order) for x in xs], lambda xs: [x.transpose(back) for x in xs])


def cut(sizes: Sequence[int], axis: int) -> Change:
    """One source is cut into targets of these sizes along an axis."""
    places = list(itertools.accumulate(sizes))[:-1]
    return Change(lambda xs: list(np.split(xs[0], places, axis)), lambda xs: [np.concatenate(xs, axis)])


def join(sizes: Sequence[int], axis: int) -> Change:
    """Sources of these sizes become one target along an axis."""
    change = cut(sizes, axis)
    return Change(change.save, change.load)


# PyTorch's linear maps are [out, in], its convolutions [out, in, height, width] or [out, in, time, height, width].
LINEAR = transpose(1, 0)
CONV2D = transpose(2, 3, 1, 0)
CONV3D = transpose(2, 3, 4, 1, 0)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A line of a table.

    Attributes:
      sources: templates of published names.
      targets: templates of our names; () drops the sources.
      change: what happens on the way.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Change = SAME


def rule(source: str | Sequence[str], target: str | Sequence[str], change: Change = SAME) -> Rule:
    """A rule; a single name may be given as such."""
    sources, targets = ((x,) if isinstance(x, str) else tuple(x) for x in (source, target))
    return Rule(sources, targets, change)


def carry(*sources: str) -> list[Rule]:
    """Rules for names that hold nothing a network needs, and that go back as they came."""
    return [rule(source, CARRIED + _FIELD.sub(lambda field: "{" + field[1] + "}", source)) for source in sources]


def drop(*sources: str) -> list[Rule]:
    """Rules for names that hold nothing a network needs."""
    return [Rule((source,), ()) for source in sources]


@dataclasses.dataclass(frozen=True)
class Job:
    """A rule applied to names that exist."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Change

    def run(self, tensors: Mapping[str, Tensor]) -> list[tuple[str, np.ndarray]]:
        """Reads the sources and returns the targets."""
        return list(zip(self.targets, self.change.load([tensors[name].read() for name in self.sources]), strict=True))


def _pattern(template: str) -> re.Pattern[str]:
    """Template -> regular expression with a named group for every field."""
    parts, end = [], 0
    for field in _FIELD.finditer(template):
        parts += [re.escape(template[end : field.start()]), f"(?P<{field[1]}>{field[2] or r'[0-9]+'})"]
        end = field.end()
    return re.compile("".join(parts) + re.escape(template[end:]))


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda field: fields[field[1]], template)


def matches(templates: Iterable[str], name: str) -> bool:
    """Whether a name is one of those that templates stand for."""
    return any(_pattern(template).fullmatch(name) for template in templates)


def invert(table: Iterable[Rule]) -> list[Rule]:
    """The table for the way back; words of a field are known on both sides."""
    back = []
    for line in table:
        if not line.targets:
            continue
        words = {field[1]: field[0] for t in line.sources for field in _FIELD.finditer(t)}
        targets = tuple(_FIELD.sub(lambda f: words[f[1]], t) for t in line.targets)  # noqa: B023
        sources = tuple(_FIELD.sub(lambda f: "{" + f[1] + "}", t) for t in line.sources)
        back.append(Rule(targets, sources, Change(line.change.save, line.change.load)))
    return back


def filled_in(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` with the values that it leaves out and its class would fill in; tuples and floats as in those."""
    given = {key: value for key, value in config.items() if value is not None}
    alike = {k: type(v)(given[k]) for k, v in defaults.items() if k in given and isinstance(v, bool | float | tuple)}
    return {**defaults, **given, **alike}


def renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Values of a `config.json` under our names, by {their key: ours}."""
    return {ours: config[theirs] for theirs, ours in names.items()}


def plan(table: Sequence[Rule], names: Iterable[str], wanted: Iterable[str] | None, what: str) -> list[Job]:
    """Matches names with a table.

    Args:
      table: the rules.
      names: all source names.
      wanted: all target names; None = whatever comes out.
      what: of what, for errors.

    Raises:
      UserError: if a name matches no rule or several, a rule finds only some of its sources, or targets are missing,
        unknown or filled twice.
    """
    patterns = [[_pattern(template) for template in line.sources] for line in table]
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]] = {}
    unknown, twice = [], []
    for name in names:
        hits = [
            (r, s, match)
            for r, sources in enumerate(patterns)
            for s, pattern in enumerate(sources)
            if (match := pattern.fullmatch(name))
        ]
        if len(hits) != 1:
            (twice if hits else unknown).append(name)
            continue
        r, s, match = hits[0]
        groups.setdefault((r, tuple(sorted(match.groupdict().items()))), {})[s] = name
    jobs, filled, partial = [], [], []
    for (r, fields), sources in groups.items():
        line = table[r]
        if len(sources) < len(line.sources):
            partial += [_fill(t, dict(fields)) for s, t in enumerate(line.sources) if s not in sources]
            continue
        targets = tuple(_fill(t, dict(fields)) for t in line.targets)
        filled += targets
        jobs.append(Job(tuple(sources[s] for s in range(len(sources))), targets, line.change))
    parameters = {t for t in filled if not t.startswith(CARRIED)}
    known = parameters if wanted is None else set(wanted)
    missing, extra = known - parameters, parameters - known
    repeated = {t for t in filled if filled.count(t) > 1} if len(set(filled)) < len(filled) else set()
    problems = {
        "names in the file that no rule knows": unknown,
        "names that several rules know": twice,
        "names that are missing in the file": partial,
        "parameters that nothing in the file fills": missing,
        "parameters that the network does not have": extra,
        "parameters that are filled twice": repeated,
    }
    if any(problems.values()):
        listed = "; ".join(f"{title}: {_some(items)}" for title, items in problems.items() if items)
        raise UserError(f"{what} does not fit: {listed}.")
    return jobs


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


def convert(
    table: Sequence[Rule], tensors: Mapping[str, Tensor], wanted: Mapping[str, Shape], what: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) for every wanted name and what is carried, a rule at a time, in the order of the wanted.

    Raises:
      UserError: as `plan` does, before anything is read; and for an array of another shape than wanted.
    """
    jobs = plan(table, tensors, wanted, what)
    order = {name: i for i, name in enumerate(wanted)}
    jobs = sorted((job for job in jobs if job.targets), key=lambda job: min(order.get(t, -1) for t in job.targets))
    return _run(jobs, tensors, wanted, what)


def _run(
    jobs: Sequence[Job], tensors: Mapping[str, Tensor], wanted: Mapping[str, Shape], what: str
) -> Iterator[tuple[str, np.ndarray]]:
    for job in jobs:
        for name, array in job.run(tensors):
            if name in wanted and array.shape != tuple(wanted[name]):
                raise UserError(
                    f"{what} does not fit: {', '.join(job.sources)} gives {name} the shape {array.shape}, and the"
                    f" network has {tuple(wanted[name])}."
                )
            yield name, array
