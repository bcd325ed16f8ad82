"""Causal self-attention with grouped queries, and the key/value cache that decoding keeps.

Shapes: B batch, L length, S key length (L, or the capacity of the cache), D model, N query heads, K key/value heads,
G = N / K queries per key/value head, H head dim.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from imagegpt_jax.models import layers
from imagegpt_jax.models.flash import flash_attention, resolve
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.parallel import manual_collectives, sharding

# Who attends to whom: a mask, or, where a flash kernel makes its own, the segments.
Visible = Bool[Array, "B L S"] | Int[Array, "B L"]
LayerCache = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]
# What a masked score becomes: finite, so that no row of padding turns into NaN.
MASKED = -1e30
# The segment of a cache slot that nothing has been written to: no token has it, so nobody attends there.
EMPTY = -1
# Blocks of queries that attention on CPU is cut into.
MOST_BLOCKS, SMALLEST_BLOCK = 4, 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far; one pair of arrays per layer, so that a step updates them in place.

    Attributes:
      keys: per layer [B, K, S, H].
      values: per layer [B, K, S, H].
      segments_BS: segment of each slot; EMPTY where nothing is written.
      length: slots written: int32 [B], or a scalar where all rows march together (writing is then one slice).
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    segments_BS: Int[Array, "B S"]
    length: Int[Array, "*B"]

    @property
    def capacity(self) -> int:
        """Number of slots S."""
        return self.segments_BS.shape[1]

    def insert(self, slot: Int[Array, ""] | int, row: "Cache") -> "Cache":
        """Replaces row `slot` by the only row of another cache, so that a server can admit one request at a time.

        This cache must hold a length per row, and both must have the same capacity.
        """

        def put(rows, row):
            return jax.lax.dynamic_update_slice_in_dim(rows, row.astype(rows.dtype), slot, axis=0)

        return Cache(
            keys=tuple(map(put, self.keys, row.keys)),
            values=tuple(map(put, self.values, row.values)),
            segments_BS=put(self.segments_BS, row.segments_BS),
            length=put(self.length, row.length.reshape(1)),
        )

    def grown(self, capacity: int) -> "Cache":
        """The same slots with empty ones behind them, `capacity` in all."""
        more = capacity - self.capacity

        def longer(rows_BKSH):
            return jnp.pad(rows_BKSH, ((0, 0), (0, 0), (0, more), (0, 0)))

        return Cache(
            keys=tuple(map(longer, self.keys)),
            values=tuple(map(longer, self.values)),
            segments_BS=jnp.pad(self.segments_BS, ((0, 0), (0, more)), constant_values=EMPTY),
            length=self.length,
        )


def write(old: jax.Array, new: jax.Array, length: Int[Array, "*B"]) -> jax.Array:
    """Writes `new` [B, ..., L, E] into `old` [B, ..., S, E] from slot `length` on; callers check that it fits."""

    def update(old, new, length):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), length, axis=old.ndim - 2)

    return update(old, new, length) if length.ndim == 0 else jax.vmap(update)(old, new, length)


def visible(segments_BL: Int[Array, "B L"], config: GPTConfig) -> Visible:
    """What the attention of whole sequences needs to know of who attends to whom."""
    return causal_mask(segments_BL) if resolve(config) == "xla" else segments_BL


def causal_mask(segments_BL: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Who attends to whom: earlier tokens, and oneself, of the same segment."""
    length = segments_BL.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & (segments_BL[:, :, None] == segments_BL[:, None, :])


def cache_mask(cache: Cache, segments_BL: Int[Array, "B L"], alone: int = 0) -> Bool[Array, "B L S"]:
    """The same for L new tokens whose segments are already written at the end of `cache` (before its length grew).

    The last `alone` of them do not see one another.
    """
    slots_S = jnp.arange(cache.capacity)
    count = segments_BL.shape[1]
    last_BL = cache.length.reshape(-1, 1) + jnp.arange(count)
    seen_BLS = (slots_S <= last_BL[:, :, None]) & (segments_BL[:, :, None] == cache.segments_BS[:, None, :])
    if alone:
        first_B11 = (cache.length.reshape(-1, 1) + count - alone)[..., None]
        seen_BLS &= (slots_S < first_B11) | (slots_S == last_BL[:, :, None]) | (last_BL[:, :, None] < first_B11)
    return seen_BLS


def attend(
    q_BLNH: Float[Array, "B L N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BLS: Bool[Array, "B L S"],
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Float[Array, "B L N H"]:
    """Scaled dot-product attention with a softmax in fp32 or wider; dropout takes a key for each row and kv head."""
    batch, length, heads, head_dim = q_BLNH.shape
    kv_heads = k_BKSH.shape[1]
    q_BLKGH = q_BLNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim) / math.sqrt(head_dim)
    q_BKGLH = q_BLKGH.transpose(0, 2, 3, 1, 4)
    kept_BKGLS = None
    if dropout and key is not None:
        shape = (*q_BKGLH.shape[:-1], k_BKSH.shape[2])
        kept_BKGLS = layers.dropout(jnp.ones(shape, layers.accumulation_dtype(k_BKSH.dtype)), dropout, key)
    attention: Any = _attention
    y_BKGLH = attention(q_BKGLH, k_BKSH, v_BKSH, mask_BLS, kept_BKGLS)
    return y_BKGLH.transpose(0, 3, 1, 2, 4).reshape(q_BLNH.shape)


@jax.custom_vjp
def _attention(
    q_BKGLH: Float[Array, "B K G L H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BLS: Bool[Array, "B L S"],
    kept_BKGLS: Float[Array, "B K G L S"] | None,
) -> Float[Array, "B K G L H"]:
    """softmax(q k^T) v with its gradient as FlashAttention has it (arXiv:2205.14135, appendix B.2): the softmax's takes
    a sum over a head's dimensions, of the output, where autodiff takes one over the keys, of all scores.

    `kept` multiplies the weights: 0 where dropped out, else 1 / (1 - rate).
    """
    return _attention_forward(q_BKGLH, k_BKSH, v_BKSH, mask_BLS, kept_BKGLS)[0]


def _attention_forward(
    q_BKGLH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BLS: jax.Array, kept_BKGLS: jax.Array | None
) -> tuple[jax.Array, Any]:
    scores_BKGLS = jnp.einsum(
        "bkglh,bksh->bkgls", q_BKGLH, k_BKSH, preferred_element_type=layers.accumulation_dtype(k_BKSH.dtype)
    )
    weights_BKGLS = jax.nn.softmax(jnp.where(mask_BLS[:, None, None], scores_BKGLS, MASKED), axis=-1)
    left_BKGLS = _drop(weights_BKGLS, kept_BKGLS).astype(v_BKSH.dtype)
    y_BKGLH = jnp.einsum("bkgls,bksh->bkglh", left_BKGLS, v_BKSH)
    return y_BKGLH, (q_BKGLH, k_BKSH, v_BKSH, mask_BLS, kept_BKGLS, weights_BKGLS, y_BKGLH)


def _attention_backward(saved: Any, dy_BKGLH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q_BKGLH, k_BKSH, v_BKSH, mask_BLS, kept_BKGLS, weights_BKGLS, y_BKGLH = saved
    kind = weights_BKGLS.dtype
    left_BKGLS = _drop(weights_BKGLS, kept_BKGLS).astype(dy_BKGLH.dtype)
    dv_BKSH = jnp.einsum("bkgls,bkglh->bksh", left_BKGLS, dy_BKGLH)
    dweights_BKGLS = jnp.einsum("bkglh,bksh->bkgls", dy_BKGLH, v_BKSH, preferred_element_type=kind)
    mean_BKGL1 = jnp.sum(dy_BKGLH.astype(kind) * y_BKGLH.astype(kind), axis=-1, keepdims=True)
    dscores_BKGLS = weights_BKGLS * (_drop(dweights_BKGLS, kept_BKGLS) - mean_BKGL1)
    # Weights are 0 where the mask is, but for a row that sees nothing: its scores are constants.
    dscores_BKGLS = jnp.where(mask_BLS[:, None, None], dscores_BKGLS, 0).astype(k_BKSH.dtype)
    dq_BKGLH = jnp.einsum("bkgls,bksh->bkglh", dscores_BKGLS, k_BKSH)
    return dq_BKGLH, jnp.einsum("bkgls,bkglh->bksh", dscores_BKGLS, q_BKGLH), dv_BKSH, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _drop(weights_BKGLS: jax.Array, kept_BKGLS: jax.Array | None) -> jax.Array:
    return weights_BKGLS if kept_BKGLS is None else weights_BKGLS * kept_BKGLS


def attend_causally(
    q_BLNH: Float[Array, "B L N H"],
    k_BLKH: Float[Array, "B L K H"],
    v_BLKH: Float[Array, "B L K H"],
    mask_BLL: Bool[Array, "B L L"],
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Float[Array, "B L N H"]:
    """`attend` of whole sequences, whose mask shows nothing of what follows.

    On CPU in blocks of queries, each with the keys up to its last: with four of them, 5/8 of the products.
    """
    length = q_BLNH.shape[1]
    k_BKLH, v_BKLH = k_BLKH.swapaxes(1, 2), v_BLKH.swapaxes(1, 2)
    count = 1
    if sharding.platform() == "cpu" and not dropout:
        count = max(1, min(MOST_BLOCKS, length // SMALLEST_BLOCK))
    ends = [-(-length * i // count) for i in range(count + 1)]
    parts = [
        attend(q_BLNH[:, i:j], k_BKLH[:, :, :j], v_BKLH[:, :, :j], mask_BLL[:, i:j, :j], dropout=dropout, key=key)
        for i, j in itertools.pairwise(ends)
    ]
    return parts[0] if count == 1 else jnp.concatenate(parts, axis=1)


def _head_keys(keys_B: jax.Array, kv_heads: int) -> jax.Array:
    """A key for each of the kv heads that this device computes, [B, K]: the same ones however heads are shared out."""
    first = manual_collectives.part_index("kv_heads") * kv_heads
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(keys_B, first + jnp.arange(kv_heads))


class Attention(nnx.Module):
    """Multi-head attention; with fewer key/value heads than heads, grouped-query attention (arXiv:2305.13245).

    Queries, keys and values are separate matrices: on CPU one fused matrix costs a fifth of the block's time in the
    copies that cut it apart, and separate ones shard over heads without a reordering.
    """

    def __init__(self, config: GPTConfig, *, key: jax.Array):
        q_key, k_key, v_key, out_key = jax.random.split(key, 4)
        heads, kv_heads = config.heads * config.head_width, config.num_kv_heads * config.head_width
        shared: dict[str, Any] = {
            "bias": config.bias or config.attention_bias,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
        }
        self.config = config
        self.query = layers.Linear(config.width, heads, key=q_key, axes=("embed", "heads"), **shared)
        self.key = layers.Linear(config.width, kv_heads, key=k_key, axes=("embed", "kv_heads"), **shared)
        self.value = layers.Linear(config.width, kv_heads, key=v_key, axes=("embed", "kv_heads"), **shared)
        std = layers.fan_in_std(heads) * config.residual_scale
        self.out = layers.Linear(heads, config.width, key=out_key, axes=("heads", "embed"), std=std, **shared)
        if config.qk_norm:
            head = {"eps": config.norm_eps, "axes": (None,), "param_dtype": config.param_dtype}
            self.query_norm = layers.RMSNorm(config.head_width, **head)
            self.key_norm = layers.RMSNorm(config.head_width, **head)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        rotary: tuple[jax.Array, jax.Array] | None,
        visible: Visible,
        cache: LayerCache | None = None,
        length: Int[Array, "*B"] | None = None,
        key: jax.Array | None = None,
        layer: jax.Array | int = 0,
    ) -> tuple[Float[Array, "B L D"], LayerCache | None]:
        """Returns the attention output (before the residual) and this layer's cache with the new tokens at `length`."""
        config = self.config
        batch, new = x_BLD.shape[:2]
        q_BLNH, k_BLKH, v_BLKH = (  # the heads that this device computes
            linear(x_BLD).reshape(batch, new, -1, config.head_width) for linear in (self.query, self.key, self.value)
        )
        q_BLNH = sharding.constrain(q_BLNH, ("batch", "length", "heads", None))
        k_BLKH = sharding.constrain(k_BLKH, ("batch", "length", "kv_heads", None))
        v_BLKH = sharding.constrain(v_BLKH, ("batch", "length", "kv_heads", None))
        if config.qk_norm:
            q_BLNH, k_BLKH = self.query_norm(q_BLNH), self.key_norm(k_BLKH)
        if rotary is not None:
            q_BLNH, k_BLKH = layers.rotate(q_BLNH, rotary), layers.rotate(k_BLKH, rotary)
        if config.attention_scale or config.attention_scale_by_layer:
            # All implementations divide by sqrt(H): what differs from that goes into the queries.
            scale = config.attention_scale * math.sqrt(config.head_width) if config.attention_scale else 1.0
            q_BLNH = q_BLNH * jnp.asarray(scale / (layer + 1 if config.attention_scale_by_layer else 1), q_BLNH.dtype)
        if cache is None and visible.ndim == 2:
            y_BLNH = flash_attention(q_BLNH, k_BLKH, v_BLKH, visible, resolve(config))
        elif cache is None:
            keys_BK = None if key is None else _head_keys(key, k_BLKH.shape[2])
            y_BLNH = attend_causally(q_BLNH, k_BLKH, v_BLKH, visible, dropout=config.attention_dropout, key=keys_BK)
        else:
            assert length is not None
            # Cached keys lie [B, K, S, H]: a step's products then read them where they are, without a transpose.
            cache = (write(cache[0], k_BLKH.swapaxes(1, 2), length), write(cache[1], v_BLKH.swapaxes(1, 2), length))
            y_BLNH = attend(q_BLNH, *cache, visible)
        y_BLNH = checkpoint_name(y_BLNH, "attention")
        return self.out(y_BLNH.reshape(batch, new, -1)), cache
