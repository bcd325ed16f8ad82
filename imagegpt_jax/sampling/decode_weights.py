"""Weights as decoding wants them: one array per layer, in the precision and the layout that read fastest.

Decoding multiplies a few rows by every matrix at every token, so its time is that of reading the matrices. Done once
before the loop: cut the stacked layers apart, cast, and on CPU transpose (XLA's kernel multiplies a matrix by few
columns 1.5 times as fast as few rows by a matrix).

Shapes: R rows, D in, F out, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from imagegpt_jax.models import layers
from imagegpt_jax.models.gpt import GPT
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.parallel import sharding

LEVELS = 127  # of int8 on either side of zero


class ColumnLinear(nnx.Module):
    """`y = x W (+ b)` with W stored as [out, in] and computed as (W x^T)^T."""

    def __init__(self, linear: layers.Linear, dtype: Any):
        self.dtype = dtype
        self.weight = nnx.Param(linear.weight[...].astype(dtype).T, axes=linear.weight.axes[::-1])
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "*_ D"]) -> Float[Array, "*_ F"]:
        """Applies the map in the compute dtype."""
        y = columns(self.weight[...], x.astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Int8Linear(nnx.Module):
    """`y = x W (+ b)` with W rounded to int8, and one fp32 scale for each column (absmax / 127).

    On CPU, where only products of int8 by int8 are fast, a row of x is taken as a scale times two int8 digits, which
    keeps 15 bits of it.
    """

    def __init__(self, linear: layers.Linear, dtype: Any):
        weight_DF = linear.weight[...].astype(jnp.float32)
        scale_F = jnp.maximum(jnp.max(jnp.abs(weight_DF), axis=0), 1e-30) / LEVELS
        self.dtype = dtype
        axes = linear.weight.axes
        self.weight = nnx.Param(jnp.round(weight_DF / scale_F).astype(jnp.int8), axes=axes)
        self.scale = nnx.Param(scale_F, axes=axes[1:])
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "*_ D"]) -> Float[Array, "*_ F"]:
        """Applies the map; sums are exact on CPU and in the compute dtype's wide form elsewhere."""
        kind = layers.accumulation_dtype(self.dtype)
        if sharding.platform() == "cpu":
            y = _digits_product(x.reshape(-1, x.shape[-1]).astype(kind), self.weight[...])
            y = y.reshape(*x.shape[:-1], -1)
        else:
            y = jnp.matmul(x.astype(self.dtype), self.weight[...].astype(self.dtype), preferred_element_type=kind)
        y = (y * self.scale[...]).astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Table(nnx.Module):
    """A token table kept in the compute dtype: looking a row up reads that row alone."""

    def __init__(self, table: layers.Embedding, dtype: Any):
        self.dtype = dtype
        self.weight = nnx.Param(table.weight[...].astype(dtype), axes=table.weight.axes)

    def __call__(self, ids: Int[Array, "*_"]) -> Float[Array, "*_ D"]:
        """Looks ids up; an id outside the table is clamped to it."""
        return self.weight[...].at[ids].get(mode="clip", wrap_negative_indices=False)

    def stream(self, ids_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """A call: of the few tokens of a step the compiler may lay out the rows."""
        return self(ids_BL)

    def rows(self, start: int = 0, size: int | None = None) -> Float[Array, "V D"]:
        """Rows `start : start + size` of the table (`None`: to the end)."""
        stop = self.weight.shape[0] if size is None else start + size
        return jax.lax.slice_in_dim(self.weight[...], start, stop)


def columns(weight_FD: Float[Array, "F D"], x: Float[Array, "*_ D"]) -> Float[Array, "*_ F"]:
    """`x W^T`, computed as (W x^T)^T; the barrier keeps XLA from turning it round again."""
    y_FR = jax.lax.optimization_barrier(weight_FD @ x.reshape(-1, x.shape[-1]).T)
    return y_FR.T.reshape(*x.shape[:-1], -1)


def score(hidden_RD: Float[Array, "R D"], table_VD: Float[Array, "V D"]) -> Float[Array, "R V"]:
    """Scores of final states against rows of an output head, as `layers.score`, fast for few rows on CPU."""
    if sharding.platform() == "cpu" and table_VD.dtype == jnp.float32:
        return columns(table_VD, hidden_RD)
    return layers.score(hidden_RD, table_VD)


def _digits_product(x_RD: Float[Array, "R D"], weight_DF: Int[Array, "D F"]) -> Float[Array, "R F"]:
    """x W of an int8 W, with each row of x as scale (high + low / 254)."""
    scale_R1 = jnp.maximum(jnp.max(jnp.abs(x_RD), axis=-1, keepdims=True), 1e-30) / LEVELS
    digits_RD = x_RD / scale_R1
    high_RD = jnp.round(digits_RD)
    low_RD = jnp.round((digits_RD - high_RD) * (2 * LEVELS))
    both = jnp.concatenate([high_RD, low_RD]).astype(jnp.int8)
    high_RF, low_RF = jnp.split(jnp.matmul(both, weight_DF, preferred_element_type=jnp.int32), 2)
    return (high_RF.astype(x_RD.dtype) + low_RF.astype(x_RD.dtype) / (2 * LEVELS)) * scale_R1


def prepared(gpt: GPT) -> bool:
    """Whether `prepare` made it."""
    return isinstance(gpt.embed, Table)


@functools.partial(jax.jit, static_argnames="weights")
def prepare(gpt: GPT, weights: str = "") -> GPT:
    """The same decoder for `prefill` and `step` alone, made once before decoding.

    Args:
      gpt: as trained; it stays as it is.
      weights: "float32" or "bfloat16" for all matrices and the computation; "int8" for the matrices of blocks, with the
        rest and the computation in the decoder's own dtype; "" for its own dtype.
    """
    gpt = gpt.unstack()
    name = weights if weights in ("float32", "bfloat16") else gpt.config.dtype
    dtype = layers.as_dtype(name)
    config = dataclasses.replace(gpt.config, dtype=name)
    fast = sharding.platform() == "cpu" and dtype == jnp.float32
    linear = functools.partial(ColumnLinear if fast else _plain, dtype=dtype)
    if weights == "int8":
        _convert(gpt.blocks, config, functools.partial(Int8Linear, dtype=dtype), Table)
    _convert(gpt, config, linear, functools.partial(Table, dtype=dtype))
    return gpt


def _plain(linear: layers.Linear, dtype: Any) -> layers.Linear:
    linear.dtype = dtype
    linear.weight = nnx.Param(linear.weight[...].astype(dtype), axes=linear.weight.axes)
    return linear


def _convert(module: Any, config: GPTConfig, linear: Callable[..., Any], table: Callable[..., Any]) -> None:
    """Replaces linear maps and tables within a module, and its config."""
    if isinstance(module, nnx.List):
        for part in module:
            _convert(part, config, linear, table)
        return
    for name, value in list(vars(module).items()):
        if isinstance(value, layers.Linear | layers.Embedding):
            setattr(module, name, linear(value) if isinstance(value, layers.Linear) else table(value))
        elif isinstance(value, GPTConfig):
            module.config = config
        elif isinstance(value, nnx.Module):
            _convert(value, config, linear, table)
