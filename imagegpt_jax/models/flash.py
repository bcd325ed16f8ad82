"""Causal self-attention that never holds the scores of all heads: splash attention on TPU, cuDNN's on GPU.

Which one runs is `GPTConfig.attention`; "auto" follows the platform of the mesh in force. All give what
`attention.attend` with `attention.causal_mask` gives.

Shapes: B batch, L length, N query heads, K key/value heads, H head dim.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagegpt_jax.models.gpt_config import CUDNN_DTYPES, CUDNN_HEAD, GPTConfig
from imagegpt_jax.parallel import manual_collectives, sharding

# The kernel's tiles are multiples of the TPU's 128 lanes, and at most so long: larger ones do not fit its memory.
_LANES, _MAX_BLOCK = 128, 1024


def resolve(config: GPTConfig) -> str:
    """What `config.attention` stands for: "auto" is "splash" on TPU, and "cudnn" on GPU if that computes the dtype and
    the size of heads; elsewhere, and with dropout, "xla"."""
    if config.attention != "auto":
        return config.attention
    platform = sharding.platform()
    if config.attention_dropout:
        return "xla"
    if platform in ("gpu", "cuda"):
        return "cudnn" if config.dtype in CUDNN_DTYPES and config.head_width <= CUDNN_HEAD else "xla"
    return "splash" if platform == "tpu" else "xla"


def flash_attention(
    q_BLNH: Float[Array, "B L N H"],
    k_BLKH: Float[Array, "B L K H"],
    v_BLKH: Float[Array, "B L K H"],
    segments_BL: Int[Array, "B L"],
    implementation: str,
) -> Float[Array, "B L N H"]:
    """Attention of queries, not yet scaled, to earlier tokens, and oneself, of the same segment.

    By "splash" (arXiv:2205.14135's algorithm as a Pallas kernel; off a TPU it is interpreted, for tests) or "cudnn".
    """
    return {"splash": _splash, "cudnn": _cudnn}[implementation](q_BLNH, k_BLKH, v_BLKH, segments_BL)


def _cudnn(q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, segments_BL: jax.Array) -> jax.Array:
    length, head_dim = q_BLNH.shape[1], q_BLNH.shape[3]

    def whole(x_BLNH):  # under a mask, cuDNN's gradient wants an even length; always, heads of a multiple of eight
        return jnp.pad(x_BLNH, ((0, 0), (0, length % 2), (0, 0), (0, -head_dim % 8)))

    segments_BL = jnp.pad(segments_BL, ((0, 0), (0, length % 2)), constant_values=-1)
    same_B1LL = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    y_BLNH = jax.nn.dot_product_attention(
        *map(whole, (q_BLNH, k_BLKH, v_BLKH)),
        mask=same_B1LL,
        scale=1 / math.sqrt(head_dim),
        is_causal=True,
        implementation="cudnn",
    )
    return y_BLNH[:, :length, :, :head_dim]


def block_size(length: int) -> int:
    """The largest multiple of 128 up to 1024 that divides a length, which must be a multiple of 128."""
    return max(size for size in range(_LANES, _MAX_BLOCK + 1, _LANES) if length % size == 0)


def _splash(q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, segments_BL: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, head_dim = q_BLNH.shape[1], q_BLNH.shape[3]
    padded = -(-length // _LANES) * _LANES
    block = block_size(padded)
    blocks = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    interpret = sharding.platform() != "tpu"

    def local(q_BNLH, k_BKLH, v_BKLH, segments_BL):
        mask = masks.MultiHeadMask([masks.CausalMask((padded, padded))] * q_BNLH.shape[1])
        kernel = splash.make_splash_mha(
            mask=mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        return jax.vmap(kernel)(q_BNLH, k_BKLH, v_BKLH, splash.SegmentIds(q=segments_BL, kv=segments_BL))

    def heads_first(x_BLNH):  # the tail that is added is of a segment of its own, and causality keeps it unseen
        x_BLNH = jnp.pad(x_BLNH, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        return x_BLNH.swapaxes(1, 2)

    segments_BL = jnp.pad(segments_BL, ((0, 0), (0, padded - length)), constant_values=-1)
    heads = ("batch", "heads", None, None)
    y_BNLH = manual_collectives.map_shards(local, (heads, heads, heads, ("batch", None)), heads)(
        heads_first(q_BLNH / math.sqrt(head_dim)), heads_first(k_BLKH), heads_first(v_BLKH), segments_BL
    )
    return y_BNLH.swapaxes(1, 2)[:, :length].astype(q_BLNH.dtype)
