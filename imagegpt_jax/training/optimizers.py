"""Optimizers: schedules, weight-decay masks, global-norm clipping, and an EMA of parameters.

`make(config, axes)` reads a config with these keys (all of them visible in the config file):

    name            "adamw" | "adam" | "muon" | "adafactor" | "shampoo" | "lion" | "sgd"
    lr              peak learning rate
    schedule        "constant" | "cosine" | "linear" | "exponential" (the last three decay to lr * final_lr_ratio at the
                    last step) | "drops" (times drop_factor at each step of drops)
    warmup_steps    linear warm-up from 0
    decay_start     step at which the decay begins; 0 = after the warm-up
    final_lr_ratio  learning rate at the end of a decay, as a share of lr
    drops           steps at which the schedule "drops" lowers the learning rate
    drop_factor     what it is multiplied by at each of them
    b1              decay of the first moment, or momentum (Muon: of the Adam that trains vectors, embeddings and head)
    b2              decay of the second moment
    eps             added to the root of the second moment
    mu_dtype        dtype in which Adam, Lion, Adafactor and Muon keep the first moment
    nu_dtype        dtype in which Adam keeps the second; computed with in float32 either way
    weight_decay    decoupled weight decay, on parameters of two and more dimensions (stacked layers not counted)
    clip_norm       clip the gradient to this global L2 norm; 0 = off
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from imagegpt_jax import config as config_lib
from imagegpt_jax.config import Config
from imagegpt_jax.errors import UserError, at_least, check_ranges
from imagegpt_jax.models.layers import as_dtype
from imagegpt_jax.training import shampoo

Axes = tuple[str | None, ...]

# Muon (Jordan et al. 2024) orthogonalises hidden matrices; a parameter with one of these axes gets Adam instead.
NOT_MUON = frozenset({"vocab", "codebook", "code_dim"})


def schedule(config: Config, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    Raises:
      UserError: for an unknown schedule, drops that are no steps, or a warm-up or start of decay that is not before
        the end of the run.
    """
    start = config.decay_start or config.warmup_steps
    for key in ("warmup_steps", "decay_start"):
        if config[key] and config[key] >= steps:
            raise UserError(f"optim.{key}={config[key]} must be less than steps={steps}.")
    if start < config.warmup_steps:
        raise UserError(f"optim.decay_start={start} must not be before warmup_steps={config.warmup_steps}: 0 = there.")
    if not all(isinstance(step, int) for step in config.drops):
        raise UserError(
            f'optim.drops={tuple(config.drops)} are not all steps: write --config.optim.drops="(1000, 2000)".'
        )
    decay_steps = max(1, steps - start)
    drops = {step - start: config.drop_factor for step in config.drops}
    after = config_lib.choose(
        "schedule",
        config.schedule,
        {
            "constant": lambda: optax.constant_schedule(config.lr),
            "cosine": lambda: optax.cosine_decay_schedule(config.lr, decay_steps, config.final_lr_ratio),
            "linear": lambda: optax.linear_schedule(config.lr, config.lr * config.final_lr_ratio, decay_steps),
            "exponential": lambda: optax.exponential_decay(config.lr, decay_steps, config.final_lr_ratio),
            "drops": lambda: optax.piecewise_constant_schedule(config.lr, drops),
        },
    )()
    warmup = optax.linear_schedule(config.lr / max(1, config.warmup_steps), config.lr, max(1, config.warmup_steps))
    if start > config.warmup_steps:
        held = optax.constant_schedule(config.lr)
        return optax.join_schedules([warmup, held, after], [config.warmup_steps, start])
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def learning_rate(config: Config, steps: int, updates: jax.Array) -> jax.Array:
    """The learning rate of the newest of so many updates by `make(config, steps, ...)`; NaN before the first."""
    return jnp.where(updates > 0, schedule(config, steps)(jnp.maximum(updates - 1, 0)), jnp.nan)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


RANGES = {
    "lr": at_least(0, "1e-4 is usual", below=math.inf),
    "b1": at_least(0, "0.9 is usual", below=1),
    "b2": at_least(0, "0.95 is usual", below=1),
    "weight_decay": at_least(0, "0.05 is usual", below=math.inf),
    "clip_norm": at_least(0, "1 is usual", below=math.inf),
}
EMA_DECAY = at_least(0, "0.999 is usual, 0 keeps no average", below=1)


def make(config: Config, steps: int, axes: Any, key: str = "optim") -> optax.GradientTransformation:
    """Builds the optimizer of one network.

    Args:
      config: keys as above.
      steps: length of the run, for the schedule.
      axes: tree like the trained parameters, with each parameter's logical axes without the stacked `layers` axis (a
        tuple of names; its length is the parameter's number of dimensions within a layer).
      key: where the keys are in the run's config, for errors.

    Raises:
      UserError: for an unknown optimizer or schedule, or a number that is not possible.
    """
    check_ranges(config, RANGES, f"--config.{key}.")
    lr = schedule(config, steps)
    decay_mask = jax.tree.map(lambda a: len(a) >= 2, axes, is_leaf=_is_axes)
    mu_dtype, nu_dtype = as_dtype(config.mu_dtype), as_dtype(config.nu_dtype)
    moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps, "mu_dtype": mu_dtype}
    decay = {"weight_decay": config.weight_decay, "mask": decay_mask}

    def muon() -> optax.GradientTransformation:
        return contrib.muon(
            lr,
            beta=0.95,
            weight_decay=config.weight_decay,
            adam_weight_decay=config.weight_decay,
            weight_decay_mask=decay_mask,
            adam_b1=config.b1,
            adam_b2=config.b2,
            mu_dtype=mu_dtype,
            consistent_rms=0.2,  # update RMS as Adam's: one learning rate serves both (arXiv:2502.16982, eq. 4)
            muon_weight_dimension_numbers=jax.tree.map(
                lambda a: None if len(a) < 2 or NOT_MUON & set(a) else _muon_dims(len(a)), axes, is_leaf=_is_axes
            ),
        )

    optimizer = config_lib.choose(
        "optimizer",
        config.name,
        {
            "adam": lambda: _keep_second_moment(optax.adam(lr, **moments), nu_dtype),
            "adamw": lambda: _keep_second_moment(optax.adamw(lr, **moments, **decay), nu_dtype),
            "muon": muon,
            "lion": lambda: optax.lion(lr, config.b1, config.b2, mu_dtype=mu_dtype, **decay),
            "adafactor": lambda: _adafactor(config, lr, mu_dtype, decay_mask),
            "shampoo": lambda: optax.chain(
                shampoo.scale_by_shampoo(config.b1, config.b2, axes, mu_dtype=mu_dtype),
                optax.add_decayed_weights(config.weight_decay, decay_mask),
                optax.scale_by_learning_rate(lr),
            ),
            "sgd": lambda: optax.sgd(lr, config.b1, accumulator_dtype=mu_dtype),
        },
    )()
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)


def _adafactor(config: Config, lr: optax.Schedule, mu_dtype: Any, decay_mask: Any) -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235) as large transformers are trained: momentum, a fixed decay of the second moment with
    Adam's correction (section 7.1), steps as large as the learning rate whatever the parameters', decoupled decay."""

    def corrected(step: jax.Array, b2: float) -> jax.Array:
        step = step.astype(jnp.float32)
        return b2 * (1 - b2**step) / (1 - b2 ** (step + 1))

    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=config.b2, decay_rate_fn=corrected),  # pyright: ignore
        optax.clip_by_block_rms(1.0),
        optax.ema(config.b1, debias=False, accumulator_dtype=mu_dtype) if config.b1 else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(lr),
    )


def _keep_second_moment(optimizer: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """Adam whose second moment is kept in a narrower dtype than it is computed in."""
    wide = jnp.promote_types(dtype, jnp.float32)
    if dtype == wide:
        return optimizer

    def cast(state: Any, dtype: Any) -> Any:
        adam, *rest = state
        return (adam._replace(nu=optax.tree.cast(adam.nu, dtype)), *rest)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, cast(state, wide), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(optimizer.init(params), dtype), update)


def _muon_dims(ndim: int) -> contrib.MuonDimensionNumbers:
    """The last dimension is the output; those before it within the layer are reduced over; `layers` is batched."""
    return contrib.MuonDimensionNumbers(reduction_axis=tuple(range(-ndim, -1)), output_axis=-1)


def update_ema(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """Exponential moving average of parameters, with the decay warmed up as min(decay, (1 + step) / (10 + step))."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1 - d) * (p.astype(e.dtype) - e), ema, params)
