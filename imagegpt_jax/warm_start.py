"""Beginning a run with the parameters of another, or with published weights: `config.init_from`."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from imagegpt_jax import checkpoint, distributed, events
from imagegpt_jax.checkpoint import folders
from imagegpt_jax.cli import UserError
from imagegpt_jax.config import Config
from imagegpt_jax.convert import reading
from imagegpt_jax.state import Params, TrainState, flatten, unflatten


def load_params(state: TrainState, config: Config, log: events.Log) -> TrainState:
    """Puts the parameters of another run's newest checkpoint into a new state; step, optimizer and data begin anew.

    Networks and parameters are matched by name and shape. What was and was not taken is printed and noted.

    Args:
      state: the state of a run that begins.
      config: its config: `init_from`, the workdir of the other run, or weights (a portable folder, or published ones
        such as GPT-2's, see docs/weights.md); `init_partial`, whether parameters may be missing
        there, left over, or of another shape. They are the averaged ones, where the other run keeps averages.
      log: gets an event "init".

    Raises:
      UserError: if there is no such checkpoint; or without `init_partial` if not every parameter of the networks that
        both runs have is there in the same shape: it lists both sides.
    """
    if reading.is_weights(config.init_from):
        return _load_weights(state, config, log)
    step = checkpoint.choose_step(config.init_from)
    folder = folders.root(config.init_from) / str(step) / folders.STATE
    with ocp.PyTreeCheckpointer() as reader:
        there = reader.metadata(folder).item_metadata.tree
    trainable, ema = dict(state.trainable), dict(state.ema)
    source = {**there["trainable"], **(there.get("ema") or {})}
    field = {name: "ema" if name in (there.get("ema") or {}) else "trainable" for name in source}
    names = [name for name in trainable if name in source]
    if not names:
        raise UserError(
            f"{config.init_from} trains {', '.join(sorted(source)) or 'nothing'}, and this run"
            f" {', '.join(sorted(trainable))}: give config.init_from a run of the same task."
        )
    lines: list[str] = []
    matches: dict[str, list[str]] = {}
    for name in names:
        here, held = flatten(trainable[name]), flatten(source[name])
        matches[name] = [path for path in here if path in held and tuple(held[path].shape) == here[path].shape]
        lines += [f"{name}/{p}: not in {config.init_from}" for p in here if p not in held]
        lines += [f"{name}/{p}: only in {config.init_from}" for p in held if p not in here]
        lines += [
            f"{name}/{p}: {here[p].shape} here, {tuple(held[p].shape)} there"
            for p in here
            if p in held and p not in matches[name]
        ]
    if lines and not config.init_partial:
        shown = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
        raise UserError(
            f"the parameters of {config.init_from} are not those of this run ({shown}): set"
            " --config.init_partial=True to take those that fit."
        )
    for name, match in matches.items():
        if not match:
            continue
        here = flatten(trainable[name])
        wanted = unflatten({path: here[path] for path in match}, trainable[name])
        read = _read(folder, {field[name]: {name: wanted}})[field[name]][name]
        trainable[name] = unflatten({**here, **flatten(read)}, trainable[name])
        if name in ema:
            ema[name] = jax.tree.map(lambda x: x.copy(), trainable[name])
    taken = sum(map(len, matches.values()))
    if distributed.is_first():
        print(
            f"{taken} arrays of step {step} of {config.init_from} were taken, {len(lines)} were not"
            + "".join(f"\n  {line}" for line in lines),
            file=sys.stderr,
        )
    log.write("init", source=str(config.init_from), step=step, taken=taken, left=lines)
    return dataclasses.replace(state, trainable=trainable, ema=ema)


# Tables that may have more rows here than there, and the axis of their rows: words come first in the token space.
_TABLES = {"embed/weight": 0, "head/weight": 0, "position": 1}


def _load_weights(state: TrainState, config: Config, log: events.Log) -> TrainState:
    """Puts published or portable weights into the network of their kind; tables are filled from their first row on.

    So a GPT-2 is a warm start for a decoder of its shape with its text tokenizer: ids of words are the first rows, and
    the rows of codes and special ids keep their random numbers.
    """
    name = "decoder" if "decoder" in state.trainable else "generator"
    loaded = reading.load(config.init_from, "decoder" if name == "decoder" else "tokenizer")
    here, there = flatten(state.trainable[name]), flatten(loaded.params)
    taken: Params = {}
    lines = [f"{name}/{path}: not in {config.init_from}" for path in here if path not in there]
    for path, array in there.items():
        if path not in here:
            lines.append(f"{name}/{path}: only in {config.init_from}")
            continue
        like, axis = here[path], _TABLES.get(path)
        fits = [n == m or (i == axis and n < m) for i, (n, m) in enumerate(zip(array.shape, like.shape, strict=False))]
        if array.ndim != like.ndim or not all(fits):
            lines.append(f"{name}/{path}: {like.shape} here, {array.shape} there")
            continue
        rows = tuple(slice(0, n) for n in array.shape)
        filled = jax.jit(lambda x, y, rows=rows: x.at[rows].set(y), out_shardings=like.sharding)
        taken[path] = filled(like, np.asarray(array.astype(like.dtype)))
    if not taken or (lines and not config.init_partial):
        shown = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
        raise UserError(
            f"the parameters of {config.init_from} are not those of this run ({shown}): give config.model the shape"
            " of the weights, or set --config.init_partial=True to take those that fit."
        )
    trainable, ema = dict(state.trainable), dict(state.ema)
    trainable[name] = unflatten({**here, **taken}, trainable[name])
    if name in ema:
        ema[name] = jax.tree.map(lambda x: x.copy(), trainable[name])
    if distributed.is_first():
        print(
            f"{len(taken)} arrays of {config.init_from} were taken, {len(lines)} were not"
            + "".join(f"\n  {line}" for line in lines),
            file=sys.stderr,
        )
    log.write("init", source=str(config.init_from), step=0, taken=len(taken), left=lines)
    return dataclasses.replace(state, trainable=trainable, ema=ema)


def _read(folder: Any, wanted: Mapping[str, dict[str, Params]]) -> Any:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(
            folder, args=ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True)
        )
