"""Schedules of classifier-free guidance: the share of the full scale at each token. NumPy only.

A schedule is a function (t, power=, start=, end=) -> share [N], float64, where token i of N stands at t = i / N and the
rest are `Sampling`'s cfg_power, cfg_start and cfg_end; the scale is 1 + (cfg_scale - 1) share. A new one is a line of
`SCHEDULES`, or "module:name" of a function of your own.

Shapes: N tokens to decode.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from imagegpt_jax.errors import UserError
from imagegpt_jax.plugins import resolve

Shares = Float[np.ndarray, " N"]


def constant(t_N: Shares, **_: float) -> Shares:
    """The full scale everywhere."""
    return np.ones_like(t_N)


def interval(t_N: Shares, *, start: float, end: float, **_: float) -> Shares:
    """The full scale where start <= t < end, none elsewhere (arXiv:2404.07724)."""
    return ((t_N >= start) & (t_N < end)).astype(np.float64)


def linear(t_N: Shares, **_: float) -> Shares:
    """t."""
    return t_N


def cosine(t_N: Shares, **_: float) -> Shares:
    """(1 - cos(pi t)) / 2."""
    return (1 - np.cos(np.pi * t_N)) / 2


def power_cosine(t_N: Shares, *, power: float, **_: float) -> Shares:
    """(1 - cos(pi t^power)) / 2, as in RAR (arXiv:2411.00776)."""
    return (1 - np.cos(np.pi * t_N**power)) / 2


SCHEDULES: dict[str, Callable[..., Shares]] = {
    "constant": constant,
    "interval": interval,
    "linear": linear,
    "cosine": cosine,
    "power_cosine": power_cosine,
}


def scales(schedule: str, steps: int, scale: float, *, power: float, start: float, end: float) -> Shares:
    """The scale at each of `steps` tokens, float32.

    Raises UserError if a schedule of your own gives something else than a finite number for each token.
    """
    t_N = np.arange(steps, dtype=np.float64) / max(steps, 1)
    share_N = np.asarray(resolve(schedule, "cfg_schedule", SCHEDULES)(t_N, power=power, start=start, end=end))
    if share_N.shape != t_N.shape or not np.isfinite(share_N).all():
        raise UserError(f"cfg_schedule={schedule} must give {steps} finite numbers, and gave shape {share_N.shape}.")
    return (1 + (scale - 1) * share_N).astype(np.float32)
