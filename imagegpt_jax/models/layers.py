"""Layers that several networks share: linear maps, embeddings, norms, dropout and rotary positions.

Parameters are kept in `param_dtype` and cast to the compute `dtype` where they are used; the statistics of norms are
fp32 (float64 if the computation is: `accumulation_dtype`). Every parameter names its logical axes (`axes=`), which only
`parallel/sharding.py` maps to a mesh.

Shapes: B batch, L length, D input width, F output width, N heads, H head dim, V vocabulary; `_` any leading dimensions.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from imagegpt_jax.config import choose
from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.models import rope
from imagegpt_jax.parallel import manual_collectives, sharding

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "float64": jnp.float64}
NORMS = ("rms", "layer")
# By the names of this project; `convert` knows what other libraries call them.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "clipped_gelu": lambda x: jnp.clip(jax.nn.gelu(x, approximate=False), -10, 10),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": functools.partial(jax.nn.leaky_relu, negative_slope=0.01),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "mish": jax.nn.mish,
    "hard_swish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * (1 + jax.scipy.special.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "sqrt_softplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "identity": lambda x: x,
}


def as_dtype(name: str) -> jnp.dtype:
    """The dtype that a config names; raises UserError for an unknown name, or float64 while JAX keeps to 32 bits."""
    dtype = jnp.dtype(choose("dtype", name, DTYPES))
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UserError(f"dtype {name!r} needs 64-bit numbers, which are off in JAX: set JAX_ENABLE_X64=1.")
    return dtype


def accumulation_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of statistics, softmax and losses beside a computation in `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def fan_in_std(d_in: int) -> float:
    """Standard deviation 1/sqrt(fan-in), which keeps the variance of activations."""
    return 1.0 / math.sqrt(d_in)


@jax.custom_vjp
def _product_on_cpu(x_MD: Float[Array, "M D"], weight_DF: Float[Array, "D F"]) -> Float[Array, "M F"]:
    """`x W`, whose weight's gradient transposes x before it multiplies: XLA's CPU backend leaves products that contract
    two first dimensions to a slower library. Products that share x share its transpose."""
    return x_MD @ weight_DF


def _product_forward(x_MD: jax.Array, weight_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x_MD @ weight_DF, (x_MD, weight_DF)


def _product_backward(saved: tuple[jax.Array, jax.Array], dy_MF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MD, weight_DF = saved
    x_DM = jax.lax.optimization_barrier(x_MD.T)  # else the compiler folds the transpose into the product
    return dy_MF @ weight_DF.T, x_DM @ dy_MF


_product_on_cpu.defvjp(_product_forward, _product_backward)


class Linear(nnx.Module):
    """`y = x W (+ b)` over the last axis, with W stored as [in, out]."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        key: jax.Array,
        axes: tuple[str | None, str | None],
        bias: bool = False,
        std: float | None = None,
        dtype: str = "float32",
        param_dtype: str = "float32",
    ):
        """Draws W from N(0, std^2) (`None`: 1/sqrt(d_in)); the bias starts at zero."""
        kind = as_dtype(param_dtype)
        std = fan_in_std(d_in) if std is None else std
        self.dtype = as_dtype(dtype)
        self.weight = nnx.Param(std * jax.random.normal(key, (d_in, d_out), kind), axes=axes)
        self.bias = nnx.Param(jnp.zeros((d_out,), kind), axes=axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "*_ D"]) -> Float[Array, "*_ F"]:
        """Applies the map in the compute dtype."""
        x, weight = x.astype(self.dtype), self.weight[...].astype(self.dtype)
        if sharding.platform() == "cpu":
            # As one matrix: else the weight's gradient, a sum over two dimensions, is copied before it is multiplied,
            # which costs a third of a SwiGLU's time.
            product: Any = _product_on_cpu
            y = product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
        else:
            y = x @ weight
        if self.bias is None:
            return y
        return y + manual_collectives.on_first(self.bias[...], self.weight.axes[0]).astype(self.dtype)


class Embedding(nnx.Module):
    """A table [V, D], read by row; its rows are also what an output head scores against."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        key: jax.Array,
        axes: tuple[str | None, str | None] = ("vocab", "embed"),
        std: float = 0.02,
        dtype: str = "float32",
        param_dtype: str = "float32",
    ):
        """Draws the table from N(0, std^2)."""
        self.dtype = as_dtype(dtype)
        table_VD = std * jax.random.normal(key, (vocab_size, width), as_dtype(param_dtype))
        self.weight = nnx.Param(table_VD, axes=axes)

    def __call__(self, ids: Int[Array, "*_"]) -> Float[Array, "*_ D"]:
        """Looks ids up; an id outside the table is clamped to it."""
        # A row's gradient is a sum over all the places it is looked up at: of many terms, so never in bfloat16.
        table_VD = sharding.constrain(self.weight[...].astype(accumulation_dtype(self.dtype)), ("vocab", None))
        return table_VD.at[ids].get(mode="clip", wrap_negative_indices=False).astype(self.dtype)

    def stream(self, ids_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """What a call returns, laid out as the stream between blocks.

        Where devices share the vocabulary each looks up the ids that it has, and of the sum, of which one term is not
        zero, it is sent its columns, in the compute dtype: a quarter of what is sent for a whole one in float32.
        """
        vocab, width = self.weight.shape
        mesh = jax.sharding.get_abstract_mesh()
        even = sharding.divides_evenly((vocab, *ids_BL.shape, width), ("vocab", *manual_collectives.STREAM))
        if not sharding.residual_axes(mesh) or not even:
            return self(ids_BL)

        def local(ids_BL: jax.Array, table_VD: jax.Array) -> jax.Array:
            size = table_VD.shape[0]
            own_BL = jnp.clip(ids_BL, 0, vocab - 1) - manual_collectives.part_index("vocab") * size
            own_BL = jnp.where(own_BL < 0, size, own_BL)
            rows_BLD = table_VD.astype(accumulation_dtype(self.dtype)).at[own_BL].get(mode="fill", fill_value=0)
            return manual_collectives.sum_to_own_columns(rows_BLD.astype(self.dtype))

        axes = manual_collectives.STREAM[:2], ("vocab", None)
        return manual_collectives.map_shards(local, axes, manual_collectives.STREAM)(ids_BL, self.weight[...])

    def rows(self, start: int = 0, size: int | None = None) -> Float[Array, "V D"]:
        """Rows `start : start + size` of the table (`None`: to the end), in the compute dtype."""
        table_VD = self.weight[...]
        stop = table_VD.shape[0] if size is None else start + size
        return jax.lax.slice_in_dim(table_VD, start, stop).astype(self.dtype)


def score(x: Float[Array, "*_ D"], table_VD: Float[Array, "V D"]) -> Float[Array, "*_ V"]:
    """Scores of x against each row of a table, in `accumulation_dtype` of its dtype: an output head."""
    kind = accumulation_dtype(table_VD.dtype)
    return jnp.einsum("...d,vd->...v", x.astype(table_VD.dtype), table_VD, preferred_element_type=kind)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, *, eps: float, axes: tuple[str | None] = ("embed",), param_dtype: str = "float32"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), as_dtype(param_dtype)), axes=axes)

    def __call__(self, x: Float[Array, "*_ D"]) -> Float[Array, "*_ D"]:
        """Normalises the last axis with statistics in `accumulation_dtype` of x's dtype; the result has x's dtype."""
        y = x.astype(accumulation_dtype(x.dtype))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(y.dtype)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with a learned scale and, with `bias`, a learned shift (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(
        self, width: int, *, eps: float, bias: bool, axes: tuple[str | None] = ("embed",), param_dtype: str = "float32"
    ):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), as_dtype(param_dtype)), axes=axes)
        self.bias = nnx.Param(jnp.zeros((width,), as_dtype(param_dtype)), axes=axes) if bias else None

    def __call__(self, x: Float[Array, "*_ D"]) -> Float[Array, "*_ D"]:
        """Normalises the last axis with statistics in `accumulation_dtype` of x's dtype; the result has x's dtype."""
        y = x.astype(accumulation_dtype(x.dtype))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(y.dtype)
        return (y if self.bias is None else y + self.bias[...].astype(y.dtype)).astype(x.dtype)


def make_norm(kind: str, width: int, *, eps: float, bias: bool, param_dtype: str) -> RMSNorm | LayerNorm:
    """The norm that a config names: "rms", or "layer", perhaps with a bias; raises UserError for any other name."""
    if kind == "rms":
        return RMSNorm(width, eps=eps, param_dtype=param_dtype)
    if kind == "layer":
        return LayerNorm(width, eps=eps, bias=bias, param_dtype=param_dtype)
    raise UserError(f"unknown norm {kind!r}.{suggest(kind, NORMS)}")


def dropout(x: Float[Array, "*_"], rate: float, key: jax.Array | None) -> Float[Array, "*_"]:
    """Zeroes a fraction `rate` of x and scales up the rest; without a key, or at rate 0, x is returned as it is.

    Sixteen random bits decide each element, which halves the cost of drawing them and keeps the rate to 1e-5. An array
    of keys is for the first dimensions of x.
    """
    if key is None or rate == 0.0:
        return x
    threshold = round(rate * 65536)
    draw = functools.partial(jax.random.bits, shape=x.shape[key.ndim :], dtype=jnp.uint16)
    for _ in range(key.ndim):
        draw = jax.vmap(draw)
    keep = draw(key) >= jnp.uint16(threshold)
    return jnp.where(keep, x / (1.0 - threshold / 65536), jnp.zeros_like(x))


# ---------------------------------------------------------------------------------------------- rotary positions


def rotary_table(
    positions_BL3: Int[Array, "B L 3"],
    dims: Sequence[int],
    head_dim: int,
    theta: float,
    dtype: Any = jnp.float32,
    scaling: rope.RopeScaling | None = None,
) -> tuple[Float[Array, "B L H/2"], Float[Array, "B L H/2"]]:
    """(cos, sin) of the angles of rotary positions with several axes.

    Axis a of a position turns `dims[a] / 2` pairs of dimensions, pair j by `position * theta^(-2 j / dims[a])`
    (Su et al. 2021, arXiv:2104.09864; divided among axes as in Qwen2-VL, arXiv:2409.12191). Pairs that no axis takes
    are not turned. Computed once per batch and shared by all layers.

    Args:
      positions_BL3: (t, row, column) of each token.
      dims: even number of head dimensions for each of the three axes; their sum is at most head_dim.
      head_dim: H.
      theta: base of the geometric series of wavelengths.
      dtype: of the angles and the result; `accumulation_dtype` of the computation's.
      scaling: stretches the wavelengths of positions along t; the only axis then.
    """
    angles, factor = [], 1.0
    for axis, size in enumerate(dims):
        if scaling is not None and scaling.kind != "default" and axis == 0:
            wave_P, factor = rope.scaled(scaling, theta, size, positions_BL3[..., 0], dtype)
        else:
            wave_P = theta ** (-jnp.arange(0, size, 2, dtype=dtype) / max(size, 1))
        angles.append(positions_BL3[..., axis, None].astype(dtype) * wave_P)
    rest = (head_dim - sum(dims)) // 2
    angles.append(jnp.zeros((*positions_BL3.shape[:-1], rest), dtype))
    angles_BLP = jnp.concatenate(angles, axis=-1)
    return factor * jnp.cos(angles_BLP), factor * jnp.sin(angles_BLP)


def rotate(
    x_BLNH: Float[Array, "B L N H"], table: tuple[Float[Array, "B L H/2"], Float[Array, "B L H/2"]]
) -> Float[Array, "B L N H"]:
    """Turns pair (i, i + H/2) of each head by its angle: "rotate half"; interleaved weights need a permutation."""
    cos_BL1P, sin_BL1P = (t[:, :, None, :] for t in table)
    a, b = jnp.split(x_BLNH.astype(accumulation_dtype(x_BLNH.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos_BL1P - b * sin_BL1P, b * cos_BL1P + a * sin_BL1P], axis=-1).astype(x_BLNH.dtype)
