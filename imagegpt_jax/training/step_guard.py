"""Steps that go wrong: an update whose loss or gradient is not finite, or whose loss leaps, is left out on the device.

The state keeps what it was, the step counts, the data go on, and nothing waits for the host. When that happens
`config.guard.patience` times in a row, the guard trips: the loop, which looks at it whenever it fetches metrics or
saves, goes back to the last checkpoint and leaves out the window of the data in which it began.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from imagegpt_jax.config import Config
from imagegpt_jax.training.train_metrics import Totals

State = dict[str, jax.Array]
Tree = TypeVar("Tree")


def judge(
    config: Config, state: State, step: jax.Array, values: Totals, finite: Sequence[str] = ("loss", "gradient_norm")
) -> tuple[jax.Array, State]:
    """Whether a step counts.

    Args:
      config: `config.guard`: `spike`, how many standard deviations above its running mean a loss may be (0 = any), over
        about `window` steps, of which the first `window` are not judged; `patience`, after how many bad steps in a row
        the guard trips (0 = never).
      state: of the phase, before the step, see `train_state.init_guard`.
      step: number of the step, from 0.
      values: its metrics, of which "loss" is one.
      finite: those that must be finite, where there are such: any NaN of the update is in one of them.

    Returns:
      (whether the step counts, state after it)
    """
    good = jnp.asarray(True)
    for name in finite:
        if name in values:
            good &= jnp.isfinite(values[name].compute())
    loss = values["loss"].compute().astype(jnp.float32)
    deviation = loss - state["mean"]
    if config.spike:
        judged = state["count"] >= config.window
        good &= ~(judged & (deviation > config.spike * jnp.sqrt(state["variance"])))

    share = jnp.maximum(1.0 / (state["count"] + 1.0), 1.0 / config.window)
    first = jnp.where(state["in_a_row"] > 0, state["first"], step)
    in_a_row = jnp.where(good, 0, state["in_a_row"] + 1)
    trips = (state["tripped"] < 0) & (config.patience > 0) & (in_a_row >= config.patience)
    return good, {
        "mean": jnp.where(good, state["mean"] + share * deviation, state["mean"]),
        "variance": jnp.where(
            good, (1.0 - share) * (state["variance"] + share * deviation * deviation), state["variance"]
        ),
        "count": state["count"] + good,
        "skipped": state["skipped"] + ~good,
        "in_a_row": in_a_row,
        "first": jnp.where(good, -1, first),
        "newest": jnp.where(good, state["newest"], step),
        "tripped": jnp.where(trips, first, state["tripped"]),
    }


def reset(state: Mapping[str, State]) -> dict[str, State]:
    """The state without the memory of the last bad row, as training goes on with after it went back."""
    fresh = {"in_a_row": 0, "first": -1, "tripped": -1}
    return {
        phase: {
            k: jax.device_put(jnp.asarray(fresh[k], x.dtype), x.sharding) if k in fresh else x for k, x in s.items()
        }
        for phase, s in state.items()
    }


def choose(good: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new` if `good`, else `old`; leaves that are the same array are passed on."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(good, a, b), new, old)


def rollback_from(state: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The first step of the row that tripped the guard; None if it has not tripped. Waits for the state's arrays."""
    tripped = [int(phase["tripped"]) for phase in jax.device_get(dict(state)).values()]
    return next((step for step in tripped if step >= 0), None)


def skipped(state: Mapping[str, Mapping[str, Any]]) -> int:
    """How many steps were left out so far."""
    return sum(int(phase["skipped"]) for phase in jax.device_get(dict(state)).values())


def newest(state: Mapping[str, Mapping[str, Any]]) -> int:
    """The last step that was left out, -1 if none was."""
    return max(int(phase["newest"]) for phase in jax.device_get(dict(state)).values())
