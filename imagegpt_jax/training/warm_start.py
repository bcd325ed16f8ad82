"""Beginning a run with the parameters of another, or with published weights: `config.init_from`.

What does not fit is told by `check` before the run's workdir is written, from shapes alone; `load_params` reads.
"""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from imagegpt_jax import checkpoint
from imagegpt_jax import config as config_lib
from imagegpt_jax.checkpoint import folders, trees
from imagegpt_jax.checkpoint import manifest as manifest_lib
from imagegpt_jax.checkpoint.manifest import Damaged
from imagegpt_jax.config import Config
from imagegpt_jax.convert import reading
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import distributed, event_log
from imagegpt_jax.train_state import Network, Params, TrainState, flatten, split, unflatten

# Path -> array, or whatever has the shape of one; and that of networks by their names.
Arrays = Mapping[str, Any]
Networks = Mapping[str, Arrays]
# Tables that may have more rows here than in weights, and the axis of their rows: words come first in the token space.
_TABLES = {"embed/weight": 0, "head/weight": 0, "position": 1}
_NO_TABLES: Mapping[str, int] = {}
# How the names of Orbax's files begin that tell of arrays and hold none.
_METADATA = f"{folders.STATE}/_"
# How many parameters, and keys of a config, an error lists.
_SHOWN = 8


def check(networks: Mapping[str, Network], config: Config, weights: tuple[str, str]) -> None:
    """Checks that `config.init_from` is there and fits, without reading its arrays.

    Args:
      networks: those that the run trains.
      config: as for `load_params`.
      weights: as for `load_params`.

    Raises:
      UserError: as `load_params` does, but for damage that only the arrays show.
    """
    here = {name: _shapes(network) for name, network in networks.items()}
    if reading.is_weights(config.init_from):
        name, kind = weights
        _match_weights(here, {name: _shapes(reading.describe(config.init_from, kind)[1])}, config)
    elif checkpoint.steps(config.init_from):
        _match_run(here, _Stored.newest(config.init_from), config)
    else:
        raise UserError(
            f"config.init_from={config.init_from} holds no checkpoint and no weights: give the workdir of a run that"
            " has saved one, or a file or folder of weights."
        )


def check_network(workdir: epath.PathLike, key: str, name: str, network: Network) -> None:
    """Checks that a run has a checkpoint with all parameters of a network, without reading them.

    Args:
      workdir: of the run.
      key: of the config, that names it.
      name: of the network in the run.
      network: its structure.

    Raises:
      UserError: if there is no checkpoint, or the network is another there.
    """
    if not checkpoint.steps(workdir):
        raise UserError(f"{key}={workdir} holds no checkpoint yet: let its training run write one first.")
    there = _Stored.newest(workdir).arrays
    _, lines = _compare({name: _shapes(network)}, {name: there.get(name, {})}, workdir)
    if lines:
        raise UserError(
            f"the checkpoint of {key}={workdir} is not of the network that its config.json describes"
            f" ({_some(lines)}): bring back the one that belongs to it."
        )


def load_params(state: TrainState, config: Config, weights: tuple[str, str], log: event_log.Log) -> TrainState:
    """Puts the parameters of another run's newest checkpoint into a new state; step, optimizer and data begin anew.

    Networks and parameters are matched by name and shape, whether they are trained or frozen here and there. What was
    and was not taken is printed and noted.

    Args:
      state: the state of a run that begins.
      config: its config: `init_from`, the workdir of the other run, or weights (a portable folder, or published ones
        such as GPT-2's, see docs/weights.md); `init_partial`, whether parameters may be missing
        there, left over, or of another shape. They are the averaged ones, where the other run keeps averages.
      weights: the network that published or portable weights are put into, and the kind that they must be of.
      log: gets an event "init".

    Raises:
      UserError: if there is no such checkpoint; or without `init_partial` if not every parameter of the networks that
        both runs have is there in the same shape: it lists both sides.
    """
    here = {name: flatten(state.params(name)) for name in state.opt}
    if reading.is_weights(config.init_from):
        step, (taken, lines) = 0, _read_weights(here, *weights, config)
    else:
        step = checkpoint.choose_step(config.init_from)
        stored = _Stored.at(config.init_from, step)
        fitting, lines = _match_run(here, stored, config)
        taken = {
            name: stored.read(name, {path: here[name][path] for path in paths}, state.params(name))
            for name, paths in fitting.items()
        }
    count = sum(map(len, taken.values()))
    if distributed.is_main_process():
        origin = f"step {step} of {config.init_from}" if step else config.init_from
        print(
            f"{count} arrays of {origin} were taken, {len(lines)} were not" + "".join(f"\n  {line}" for line in lines),
            file=sys.stderr,
        )
    log.write("init", source=str(config.init_from), step=step, taken=count, left=lines)
    trainable, frozen, ema = dict(state.trainable), dict(state.frozen), dict(state.ema)
    for name, arrays in taken.items():
        merged = {**here[name], **arrays}
        trainable[name] = unflatten(merged, trainable[name])
        frozen[name] = unflatten(merged, frozen[name])
        if name in ema:
            ema[name] = jax.tree.map(lambda x: x.copy(), trainable[name])
    return dataclasses.replace(state, trainable=trainable, frozen=frozen, ema=ema)


# ------------------------------------------------------------------------------------------------------------ matching


def _shapes(network: Network) -> Arrays:
    return flatten(split(network.abstract)[1])


def _compare(
    here: Networks, there: Networks, source: Any, tables: Mapping[str, int] = _NO_TABLES
) -> tuple[dict[str, list[str]], list[str]]:
    """Paths of the parameters that fit, by network, and a line for each one that does not; of networks on both sides.

    Args:
      here: what there is to fill.
      there: what it is filled with.
      source: where that is, for the lines.
      tables: paths of arrays that may be larger here -> the axis along which they may.
    """
    fitting: dict[str, list[str]] = {}
    lines: list[str] = []
    for name in (name for name in here if name in there):  # in the same order on every process
        a, b = here[name], there[name]
        fitting[name] = [path for path in a if path in b and _fits(a[path], b[path], tables.get(path))]
        lines += [
            f"{name}/{path}: {tuple(a[path].shape)} here, {tuple(b[path].shape)} there"
            for path in a
            if path in b and path not in fitting[name]
        ]
        lines += [f"{name}/{path}: not in {source}" for path in a if path not in b]
        lines += [f"{name}/{path}: only in {source}" for path in b if path not in a]
    return fitting, lines


def _fits(here: Any, there: Any, axis: int | None) -> bool:
    if len(here.shape) != len(there.shape):
        return False
    return all(n == m or (i == axis and n < m) for i, (n, m) in enumerate(zip(there.shape, here.shape, strict=True)))


def _match(
    here: Networks, there: Networks, config: Config, remedy: str, tables: Mapping[str, int] = _NO_TABLES
) -> tuple[dict[str, list[str]], list[str]]:
    """`_compare`, with a UserError that says `remedy` if the run cannot begin so."""
    fitting, lines = _compare(here, there, config.init_from, tables)
    remedies = [remedy] if remedy else []
    if any(fitting.values()):
        if config.init_partial or not lines:
            return fitting, lines
        remedies.append("set --config.init_partial=True to take those that fit")
    raise UserError(
        f"the parameters of config.init_from={config.init_from} are not those of this run ({_some(lines)}):"
        f" {', or '.join(remedies or ['give a run of this model'])}."
    )


def _some(lines: Sequence[str]) -> str:
    return "; ".join(lines[:_SHOWN]) + (f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")


# -------------------------------------------------------------------------------------------------------- another run


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A checkpoint of another run, whose arrays are not read.

    Attributes:
      folder: of its step.
      config: the run's config.
      arrays: network -> path -> metadata with a shape; averaged parameters where there are such.
      fields: network -> path -> the field of `TrainState` that holds it.
    """

    folder: epath.Path
    config: Mapping[str, Any]
    arrays: Networks
    fields: Mapping[str, Mapping[str, str]]

    @classmethod
    def newest(cls, workdir: epath.PathLike) -> "_Stored":
        """The newest if its metadata are sound; only where they are not, arrays are read to find one that is whole.

        Raises:
          UserError: if there is none.
        """
        step = checkpoint.steps(workdir)[-1]
        folder = folders.root(workdir) / str(step)
        try:
            manifest = manifest_lib.read(folder)
            manifest_lib.verify(folder, manifest, [name for name in manifest.files if name.startswith(_METADATA)])
            return cls.at(workdir, step)
        except (Damaged, ValueError):
            return cls.at(workdir, checkpoint.choose_step(workdir))

    @classmethod
    def at(cls, workdir: epath.PathLike, step: int) -> "_Stored":
        """The one of a step."""
        folder = folders.root(workdir) / str(step)
        manifest = manifest_lib.read(folder)
        tree = trees.stored(folder)
        arrays: dict[str, dict[str, Any]] = {}
        fields: dict[str, dict[str, str]] = {}
        for field in ("trainable", "ema", "frozen"):  # an average takes the place of what it is of
            for name, params in (tree.get(field) or {}).items():
                flat = flatten(params)
                arrays.setdefault(name, {}).update(flat)
                fields.setdefault(name, {}).update(dict.fromkeys(flat, field))
        return cls(folder, manifest.config, arrays, fields)

    def read(self, name: str, wanted: Arrays, like: Params) -> Arrays:
        """Parameters of a network, in the shardings and dtypes of the `wanted`; `like` has their keys."""
        parts: dict[str, dict[str, Params]] = {}
        for field in set(self.fields[name].values()):
            flat = {path: array for path, array in wanted.items() if self.fields[name][path] == field}
            if flat:
                parts[field] = {name: unflatten(flat, like)}
        there = trees.read(self.folder, parts) if parts else {}
        return {path: array for part in there.values() for path, array in flatten(part[name]).items()}


def _match_run(here: Networks, stored: _Stored, config: Config) -> tuple[dict[str, list[str]], list[str]]:
    if not here.keys() & stored.arrays.keys():
        raise UserError(
            f"config.init_from={config.init_from} has the networks {', '.join(sorted(stored.arrays)) or '(none)'}, and"
            f" this run trains {', '.join(sorted(here))}: give a run of the same task."
        )
    ours, theirs = (config_lib.flatten(tree.get("model", {})) for tree in (config_lib.to_dict(config), stored.config))
    differing = [
        f"--config.model.{key}={shlex.quote(str(tuple(value) if isinstance(value, list) else value))}"
        for key, value in theirs.items()
        if key in ours and value != ours[key]
    ]
    more = " ..." if len(differing) > _SHOWN else ""
    remedy = f"give this run the model of that one, {' '.join(differing[:_SHOWN])}{more}" if differing else ""
    return _match(here, stored.arrays, config, remedy)


# ------------------------------------------------------------------------------------------------------------- weights


def _match_weights(here: Networks, there: Networks, config: Config) -> tuple[dict[str, list[str]], list[str]]:
    return _match(here, there, config, "give config.model the shape of the weights", _TABLES)


def _read_weights(here: Networks, name: str, kind: str, config: Config) -> tuple[dict[str, Arrays], list[str]]:
    """Published or portable weights for the network of their kind; tables are filled from their first row on.

    So a GPT-2 is a warm start for a decoder of its shape with its text tokenizer: ids of words are the first rows, and
    the rows of codes and special ids keep their random numbers.
    """
    there = flatten(reading.load(config.init_from, kind).params)
    fitting, lines = _match_weights(here, {name: there}, config)
    taken = {}
    for path in fitting[name]:
        like, array = here[name][path], there[path]
        rows = tuple(slice(0, n) for n in array.shape)
        filled = jax.jit(lambda x, y, rows=rows: x.at[rows].set(y), out_shardings=like.sharding)
        taken[path] = filled(like, np.asarray(array).astype(like.dtype))
    return {name: taken}, lines
