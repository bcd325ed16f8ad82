"""Distributed Shampoo (Anil et al. 2020, arXiv:2002.09018): a preconditioner of each side of each block of a matrix.

The step has the direction of Shampoo and the size of RMSProp on the normalised gradient ("grafting", section 4 there);
vectors, and all parameters in the first steps, take the latter alone. As DALL-E mini trained.

Shapes: X stacked matrices (layers), M rows, N columns, R row blocks of P, C column blocks of Q.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

Axes = tuple[str | None, ...]
# Relative to the largest eigenvalue (or its bound), added to statistics before their roots are taken.
RIDGE = 1e-6
EXACT = lax.Precision.HIGHEST


class Sides(NamedTuple):
    """A matrix of each side for every block."""

    rows: Float[Array, "X R C P P"]
    columns: Float[Array, "X R C Q Q"]


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`; `Sides` are None for vectors.

    Attributes:
      count: steps done.
      momentum: of the steps, in the parameters' shapes.
      squares: moving average of squares of the normalised gradient.
      statistics: moving average of G G^T and G^T G.
      roots: their inverse fourth roots.
    """

    count: jax.Array
    momentum: Any
    squares: Any
    statistics: Any
    roots: Any


def scale_by_shampoo(
    b1: float, b2: float, axes: Any, *, block: int = 2048, every: int = 10, start: int = 101, mu_dtype: Any = None
) -> optax.GradientTransformation:
    """Makes the transformation; scale its result by minus the learning rate.

    Args:
      b1: of the momentum, m <- b1 m + step.
      b2: of the statistics and of the squares.
      axes: tree like the parameters with each one's logical axes without the stacked `layers` axis.
      block: matrices are cut into blocks of at most so many rows and columns.
      every: steps between computations of the roots.
      start: steps before which the statistics are only gathered.
      mu_dtype: dtype of the momentum.
    """

    def each(function: Any, *trees: Any) -> Any:
        return jax.tree.map(lambda a, *x: function(len(a), *x), axes, *trees, is_leaf=lambda a: isinstance(a, tuple))

    def sides(ndim: int, x: jax.Array, fill: float) -> Sides | None:
        if ndim < 2:
            return None
        X, R, C, P, Q = _cut(x, ndim, block).shape[:1] + _layout(x, ndim, block)
        return Sides(*(jnp.broadcast_to(fill * jnp.eye(n), (X, R, C, n, n)) for n in (P, Q)))

    def init(params: Any) -> ShampooState:
        return ShampooState(
            count=jnp.zeros((), jnp.int32),
            momentum=jax.tree.map(lambda x: jnp.zeros(x.shape, mu_dtype or x.dtype), params),
            squares=jax.tree.map(jnp.zeros_like, params),
            statistics=each(lambda ndim, x: sides(ndim, x, 0.0), params),
            roots=each(lambda ndim, x: sides(ndim, x, 1.0), params),
        )

    def gather(ndim: int, gradient: jax.Array, old: Sides | None) -> Sides | None:
        if old is None:
            return None
        g = _cut(gradient, ndim, block)
        new = Sides(
            jnp.einsum("xrcpq,xrcsq->xrcps", g, g, precision=EXACT),
            jnp.einsum("xrcpq,xrcpt->xrcqt", g, g, precision=EXACT),
        )
        return jax.tree.map(lambda a, b: b2 * a + (1 - b2) * b, old, new)

    def step_of(ndim: int, gradient: jax.Array, squares: jax.Array, roots: Sides | None, begun: jax.Array) -> jax.Array:
        # The norm of each matrix, not of the stack of them: layers do not know of each other.
        own = tuple(range(gradient.ndim - ndim, gradient.ndim))
        unit = gradient / _norm(gradient, own)
        graft = unit / (jnp.sqrt(squares) + 1e-10)
        if roots is None:
            return graft
        cut = jnp.einsum(
            "xrcps,xrcsq,xrcqt->xrcpt", roots.rows, _cut(gradient, ndim, block), roots.columns, precision=EXACT
        )
        direction = _join(cut, gradient, ndim)
        return jnp.where(begun, direction * (_norm(graft, own) / _norm(direction, own)), graft)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ShampooState]:
        del params
        gradients, count = updates, state.count + 1

        def squared(ndim: int, gradient: jax.Array, old: jax.Array) -> jax.Array:
            own = tuple(range(gradient.ndim - ndim, gradient.ndim))
            return b2 * old + (1 - b2) * jnp.square(gradient / _norm(gradient, own))

        statistics = each(gather, gradients, state.statistics)
        roots = lax.cond(
            count % every == 0,
            lambda: jax.tree.map(inverse_fourth_root, statistics),
            lambda: state.roots,
        )
        squares = each(squared, gradients, state.squares)
        steps = each(lambda *x: step_of(*x, begun=count >= start), gradients, squares, roots)
        momentum = jax.tree.map(lambda m, x: (b1 * m + x).astype(m.dtype), state.momentum, steps)
        steps = jax.tree.map(lambda m, x: m.astype(x.dtype), momentum, steps)
        return steps, ShampooState(count, momentum, squares, statistics, roots)

    return optax.GradientTransformation(init, update)


def inverse_fourth_root(a: Float[Array, "*_ P P"]) -> Float[Array, "*_ P P"]:
    """A^(-1/4) of symmetric positive semi-definite matrices, by matrix products alone.

    Coupled Newton iteration (Guo and Higham 2006, "A Schur-Newton method for the matrix pth root and its inverse").
    """
    size = a.shape[-1]
    identity = jnp.eye(size, dtype=a.dtype)
    bound = jnp.maximum(jnp.max(jnp.sum(jnp.abs(a), axis=-1), axis=-1), 1e-30)[..., None, None]  # of the eigenvalues
    a = a / bound + RIDGE * identity
    scale = 5 / (2 * jnp.linalg.norm(a, axis=(-2, -1), keepdims=True))

    def body(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, m, x = carry
        t = (5 * identity - m) / 4
        square = jnp.matmul(t, t, precision=EXACT)
        return (
            i + 1,
            jnp.matmul(jnp.matmul(square, square, precision=EXACT), m, precision=EXACT),
            jnp.matmul(x, t, precision=EXACT),
        )

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (carry[0] < 40) & (jnp.max(jnp.abs(carry[1] - identity)) > 1e-5)

    start = (jnp.zeros((), jnp.int32), scale * a, scale**0.25 * jnp.broadcast_to(identity, a.shape))
    return lax.while_loop(unfinished, body, start)[2] * bound**-0.25


def _norm(x: jax.Array, own: tuple[int, ...]) -> jax.Array:
    return jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), axis=own, keepdims=True)), 1e-30)


def _layout(x: jax.Array, ndim: int, block: int) -> tuple[int, int, int, int]:
    """(R, C, P, Q) of a parameter whose last `ndim` dimensions are within a layer; all but the last are rows."""
    rows, columns = math.prod(x.shape[-ndim:-1]), x.shape[-1]
    R, C = -(-rows // block), -(-columns // block)
    return R, C, -(-rows // R), -(-columns // C)


def _cut(x: jax.Array, ndim: int, block: int) -> Float[Array, "X R C P Q"]:
    """Cuts a parameter into blocks, the last of which are filled up with zeros."""
    R, C, P, Q = _layout(x, ndim, block)
    x = x.reshape(-1, math.prod(x.shape[-ndim:-1]), x.shape[-1])
    x = jnp.pad(x, ((0, 0), (0, R * P - x.shape[1]), (0, C * Q - x.shape[2])))
    return x.reshape(-1, R, P, C, Q).swapaxes(2, 3)


def _join(blocks: Float[Array, "X R C P Q"], like: jax.Array, ndim: int) -> jax.Array:
    """The inverse of `_cut`."""
    X, R, C, P, Q = blocks.shape
    x = blocks.swapaxes(2, 3).reshape(X, R * P, C * Q)
    return x[:, : math.prod(like.shape[-ndim:-1]), : like.shape[-1]].reshape(like.shape)
