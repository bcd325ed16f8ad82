"""Names of TPU slices as Cloud gives them, and the shape of each.

Shapes of v4 and v5p follow the rule of https://cloud.google.com/tpu/docs/types-topologies.
"""

import functools
import itertools
import math

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.runtime.hardware import TPUS, Topology

# Chips of a slice -> shape of its torus.
_SHAPES_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SHAPES_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"}  # larger ones are of whole cubes
_CUBE = 4  # chips along its sides
_LARGEST_3D = {"v4": 4096, "v5p": 6144}  # chips
_LONGEST_SIDE = 256  # chips: Google's list of v5p slices, as its tool xpk has it, leaves out those that are longer


@functools.cache
def _shapes(generation: str) -> dict[int, str]:
    """Chips -> shape of the torus, for every slice of a generation, smallest first."""
    if generation not in _LARGEST_3D:
        return _SHAPES_2D
    cubes = range(1, _LARGEST_3D[generation] // _CUBE**3 + 1)
    large = {count * _CUBE**3: [_CUBE * side for side in _nearest_cube(count)] for count in cubes}
    return _SHAPES_3D | {n: "x".join(map(str, sides)) for n, sides in large.items() if sides[-1] <= _LONGEST_SIDE}


def _nearest_cube(count: int) -> tuple[int, int, int]:
    """The three whole numbers, ascending, whose product is `count` and which are nearest to each other."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    sides = ((a, b, count // (a * b)) for a, b in itertools.combinations_with_replacement(divisors, 2))
    return min((s for s in sides if math.prod(s) == count and s[1] <= s[2]), key=sum)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Reads a name as Cloud gives it: v4-N and v5p-N count cores, two a chip; v5e-N and v6e-N count chips.

    `v5litepod-N`, as Cloud's commands have it, is v5e-N.

    Raises:
      UserError: for an unknown generation, no size, or a size that there is no slice of.
    """
    generation, _, count = name.partition("-")
    generation = "v5e" if generation == "v5litepod" else generation
    if generation not in TPUS:
        raise UserError(
            f"unknown topology {name!r}: write v4-128, v5e-256, v5p-512, v6e-256.{suggest(generation, TPUS)}"
        )
    if not count.isdecimal():
        raise UserError(f"topology {name!r} has no size: write {generation}-N, such as {generation}-16.")
    if slices < 1:
        raise UserError(f"{slices} slices are not possible: use 1 or more.")
    shapes, cores = _shapes(generation), 2 if generation in _LARGEST_3D else 1
    chips, rest = divmod(int(count), cores)
    if rest or chips not in shapes:
        sizes = [n * cores for n in shapes]
        below, above = [n for n in sizes if n < int(count)][-1:], [n for n in sizes if n > int(count)][:1]
        near = " and ".join(f"{generation}-{n}" for n in below + above)
        raise UserError(f"there is no slice {name}: the nearest in size are {near}.")
    return Topology(f"{generation}-{int(count)}", generation, shapes[chips], slices)
