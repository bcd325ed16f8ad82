"""Vector quantization: nearest code, straight-through gradient, losses, statistics of use, revival of dead codes.

A codebook lies in pieces on the devices of the logical axis "codes"; each compares the vectors with its own codes.
Numbers are float32, or float64 if the vectors or the codebook are.

Shapes: N vectors (any leading dimensions flattened), Z code dimension, K codes, C chunks of J codes, S pieces.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from imagegpt_jax import sharding
from imagegpt_jax.cli import UserError, suggest
from imagegpt_jax.models import layers

KINDS = ("vq",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """A codebook and its losses; the defaults are LlamaGen's.

    Attributes:
      kind: "vq", nearest code of a learned codebook.
      num_codes: K.
      code_dim: Z.
      l2_normalize: whether vectors and codes are compared on the unit sphere (ViT-VQGAN, arXiv:2110.04627).
      commitment_weight: weight of |z - sg(code)|^2, which moves the encoder (the beta of VQ-VAE, arXiv:1711.00937).
      codebook_weight: weight of |sg(z) - code|^2, which moves the codebook.
      entropy_weight: weight of the entropy loss; 0 leaves it out.
      entropy_temperature: divides the negative distances in its softmax.
      revival_steps: a code that no vector chose for so many steps is replaced by a vector of the batch; 0 is never.
      chunk_codes: codes compared at a time, which bounds memory at N x chunk_codes; must divide a larger K.
    """

    kind: str = "vq"
    num_codes: int = 16384
    code_dim: int = 8
    l2_normalize: bool = True
    commitment_weight: float = 0.25
    codebook_weight: float = 1.0
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    revival_steps: int = 0
    chunk_codes: int = 16384

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown quantizer kind {self.kind!r}.{suggest(self.kind, KINDS)}")
        if self.num_codes > self.chunk_codes and self.num_codes % self.chunk_codes:
            raise UserError(
                f"chunk_codes={self.chunk_codes} does not divide num_codes={self.num_codes}: use a divisor."
            )


class QuantizerStats(NamedTuple):
    """Use of the codes in training, over global batches.

    Attributes:
      age_K: int32, steps since a vector last chose the code. All codes start old enough to be replaced, so that the
        first `revive` sets the whole codebook from the first batch (short trainings collapse without it).
      step: int32, batches seen.
    """

    age_K: Int[Array, "K"]
    step: Int[Array, ""]


class Quantized(NamedTuple):
    """Result of quantizing.

    Attributes:
      zq: the chosen codes, shaped like the input; their gradient goes straight through to the input.
      codes: int32 indices of the chosen codes.
      z: the vectors that were compared (normalised if the codes are), without gradient; `revive` draws from them.
      counts_K: float32, how often each code was chosen in the (global) batch.
      losses: unweighted terms: "commitment", "codebook" and, if its weight is not 0, "entropy".
      loss: their weighted sum, to be added to the training loss.
    """

    zq: Float[Array, "... Z"]
    codes: Int[Array, "..."]
    z: Float[Array, "... Z"]
    counts_K: Float[Array, "K"]
    losses: dict[str, Float[Array, ""]]
    loss: Float[Array, ""]


def init_stats(config: QuantizerConfig) -> QuantizerStats:
    """Statistics before the first batch."""
    return QuantizerStats(
        age_K=jnp.full(config.num_codes, config.revival_steps, jnp.int32), step=jnp.zeros((), jnp.int32)
    )


class Quantizer(nnx.Module):
    """A codebook `embedding` [K, Z], float32 or float64."""

    def __init__(self, config: QuantizerConfig, *, param_dtype: Any = "float32", key: jax.Array):
        shape = (config.num_codes, config.code_dim)
        codebook_KZ = jax.random.uniform(key, shape, param_dtype, -1 / config.num_codes, 1 / config.num_codes)
        codebook_KZ = l2_normalize(codebook_KZ) if config.l2_normalize else codebook_KZ
        self.embedding = nnx.Param(codebook_KZ, axes=("codebook", "code_dim"))
        self.config = config

    def codebook(self) -> Float[Array, "K Z"]:
        """The codes as they are compared and decoded: normalised if the config says so."""
        codebook_KZ = sharding.constrain(self.embedding[...], ("codes", None))
        return l2_normalize(codebook_KZ) if self.config.l2_normalize else codebook_KZ

    def lookup(self, codes: Int[Array, "..."]) -> Float[Array, "... Z"]:
        """Indices -> codes."""
        return jnp.take(self.codebook(), codes, axis=0)

    def nearest(self, z: Float[Array, "... Z"]) -> Int[Array, "..."]:
        """Vectors -> indices of the nearest codes, int32."""
        z_NZ = self._compared(z).reshape(-1, z.shape[-1])
        return nearest_codes(z_NZ, self.codebook(), self.config.chunk_codes).reshape(z.shape[:-1])

    def _compared(self, z: Float[Array, "... Z"]) -> Float[Array, "... Z"]:
        z = z.astype(layers.wide(z.dtype))
        return l2_normalize(z) if self.config.l2_normalize else z

    def __call__(self, z: Float[Array, "... Z"]) -> Quantized:
        """Quantizes.

        Losses follow VQ-VAE (arXiv:1711.00937, equation 3), as means over vectors and dimensions.
        """
        config = self.config
        z, codebook_KZ = self._compared(z), self.codebook()
        z_NZ = z.reshape(-1, z.shape[-1])
        codes_N = nearest_codes(lax.stop_gradient(z_NZ), lax.stop_gradient(codebook_KZ), config.chunk_codes)
        zq_NZ = sharding.constrain(jnp.take(codebook_KZ, codes_N, axis=0), ("batch", None))
        losses = {
            "commitment": jnp.mean(jnp.square(z_NZ - lax.stop_gradient(zq_NZ))),
            "codebook": jnp.mean(jnp.square(lax.stop_gradient(z_NZ) - zq_NZ)),
        }
        loss = config.commitment_weight * losses["commitment"] + config.codebook_weight * losses["codebook"]
        if config.entropy_weight:
            losses["entropy"] = entropy_loss(z_NZ, codebook_KZ, config.entropy_temperature, config.chunk_codes)
            loss = loss + config.entropy_weight * losses["entropy"]
        # z - sg(z) is exactly zero, so training decodes the very values that `lookup` gives.
        zq_NZ = lax.stop_gradient(zq_NZ) + (z_NZ - lax.stop_gradient(z_NZ))
        counts_K = jnp.zeros(config.num_codes, jnp.float32).at[codes_N].add(1.0)
        return Quantized(
            zq=zq_NZ.reshape(z.shape),
            codes=codes_N.reshape(z.shape[:-1]),
            z=lax.stop_gradient(z),
            counts_K=counts_K,
            losses=losses,
            loss=loss,
        )


def update_stats(stats: QuantizerStats, counts_K: Float[Array, "K"]) -> QuantizerStats:
    """The statistics after a batch of which so many vectors chose each code."""
    # In the first batch the codes are still random: being chosen does not save one from `revive`.
    used_K = (counts_K > 0) & (stats.step > 0)
    return QuantizerStats(age_K=jnp.where(used_K, 0, stats.age_K + 1), step=stats.step + 1)


def l2_normalize(x: Float[Array, "... Z"]) -> Float[Array, "... Z"]:
    """x / |x| over the last axis, with a gradient of zero instead of nan at x = 0."""
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _similarity(z_NZ: Float[Array, "N Z"], codebook_JZ: Float[Array, "J Z"]) -> Float[Array, "N J"]:
    """-|z - code|^2 + |z|^2: the negative squared distance up to a constant per vector, as one matrix product."""
    # Codes can be close together: the bfloat16 passes of a TPU's default precision would choose wrong ones.
    dot_NJ = jnp.einsum("nz,jz->nj", z_NZ, codebook_JZ, precision=lax.Precision.HIGHEST)
    return 2 * dot_NJ - jnp.sum(jnp.square(codebook_JZ), axis=-1)


def _chunks(codebook_KZ: Float[Array, "K Z"], chunk: int) -> Float[Array, "C J Z"]:
    """Cuts a codebook into chunks of `chunk` codes; code k is row k // C of chunk k % C.

    Every C-th code, not J neighbours: a device that holds a piece of the codebook then has a piece of every chunk.
    """
    K, Z = codebook_KZ.shape
    C = max(1, K // chunk)
    return sharding.constrain(codebook_KZ.reshape(K // C, C, Z).swapaxes(0, 1), (None, "codes", None))


def _nearest_of(z_NZ: Float[Array, "N Z"], chunk_JZ: Float[Array, "J Z"]) -> tuple[Array, Int[Array, "N"]]:
    """Greatest similarity of each vector, and the row that has it, the first of equals."""
    N, J = z_NZ.shape[0], chunk_JZ.shape[0]
    S = sharding.axis_parts("codes")
    S = S if J % S == 0 else 1
    # Each piece finds its own best; only these [N, S] travel.
    similarity_NSJ = _similarity(z_NZ, chunk_JZ).reshape(N, S, J // S)
    similarity_NSJ = sharding.constrain(similarity_NSJ, ("batch", "codes", None))
    row_NS = jnp.argmax(similarity_NSJ, axis=-1).astype(jnp.int32)
    value_NS = jnp.max(similarity_NSJ, axis=-1)
    row_NS, value_NS = (sharding.constrain(x, ("batch", None)) for x in (row_NS, value_NS))
    piece_N1 = jnp.argmax(value_NS, axis=-1, keepdims=True).astype(jnp.int32)
    row_N1 = piece_N1 * (J // S) + jnp.take_along_axis(row_NS, piece_N1, axis=-1)
    return jnp.max(value_NS, axis=-1), row_N1[:, 0]


def nearest_codes(z_NZ: Float[Array, "N Z"], codebook_KZ: Float[Array, "K Z"], chunk: int) -> Int[Array, "N"]:
    """Index of the code at the least Euclidean distance, the first of equals; `chunk` codes are compared at a time."""
    chunks_CJZ = _chunks(codebook_KZ, chunk)
    C, N = chunks_CJZ.shape[0], z_NZ.shape[0]
    if C == 1:
        return _nearest_of(z_NZ, chunks_CJZ[0])[1]

    def body(best, chunk):
        offset, chunk_JZ = chunk
        value_N, row_N = _nearest_of(z_NZ, chunk_JZ)
        code_N = row_N * C + offset
        better_N = (value_N > best[0]) | ((value_N == best[0]) & (code_N < best[1]))
        return (jnp.where(better_N, value_N, best[0]), jnp.where(better_N, code_N, best[1])), None

    start = jnp.full(N, -jnp.inf, jnp.result_type(z_NZ, codebook_KZ)), jnp.zeros(N, jnp.int32)
    best, _ = lax.scan(body, start, (jnp.arange(C, dtype=jnp.int32), chunks_CJZ))
    return best[1]


def entropy_loss(
    z_NZ: Float[Array, "N Z"], codebook_KZ: Float[Array, "K Z"], temperature: float, chunk: int
) -> Float[Array, ""]:
    """Mean entropy of p(code | z) minus the entropy of the mean over the batch, in nats.

    p is the softmax of -|z - code|^2 / temperature. Low means that every vector is sure of its code while the batch
    uses all of them. As in MaskGIT's VQ and LFQ (MAGVIT-v2, arXiv:2310.05737, equation 5).
    """
    chunks_CJZ = _chunks(codebook_KZ, chunk)
    kind = jnp.result_type(z_NZ, codebook_KZ)

    def normaliser(total_N, chunk_JZ):
        logits_NJ = _similarity(z_NZ, chunk_JZ) / temperature
        return jnp.logaddexp(total_N, jax.nn.logsumexp(logits_NJ, axis=-1)), None

    def entropies(carry, chunk_JZ):
        log_p_NJ = _similarity(z_NZ, chunk_JZ) / temperature - normaliser_N[:, None]
        p_NJ = jnp.exp(log_p_NJ)
        mean_J = jnp.mean(p_NJ, axis=0)
        sample = -jnp.mean(jnp.sum(p_NJ * log_p_NJ, axis=-1))
        batch = -jnp.sum(mean_J * jnp.log(jnp.maximum(mean_J, 1e-30)))
        return carry + sample - batch, None

    # Recomputed in the backward pass: otherwise the scans would keep every chunk's [N, J], which is [N, K] after all.
    start_N = jnp.full(z_NZ.shape[0], -jnp.inf, kind)
    normaliser_N, _ = lax.scan(jax.checkpoint(normaliser), start_N, chunks_CJZ)
    loss, _ = lax.scan(jax.checkpoint(entropies), jnp.zeros((), kind), chunks_CJZ)
    return loss


def revive(
    config: QuantizerConfig,
    codebook_KZ: Float[Array, "K Z"],
    stats: QuantizerStats,
    z: Float[Array, "... Z"],
    key: jax.Array,
) -> tuple[Float[Array, "K Z"], QuantizerStats, Bool[Array, "K"]]:
    """Replaces codes that were not chosen for `config.revival_steps` steps by vectors of the batch, drawn by `key`.

    Call it after the optimizer's update with the `Quantized.z` of the same step. The first call replaces all codes.

    Returns:
      The codebook, the statistics with the new codes' age at zero, and which codes were replaced (what is kept per
      code, such as its moving average, should start anew there).
    """
    if not config.revival_steps:
        return codebook_KZ, stats, jnp.zeros(config.num_codes, bool)
    z_NZ = z.reshape(-1, z.shape[-1]).astype(codebook_KZ.dtype)
    dead_K = stats.age_K >= config.revival_steps
    # The r-th dead code takes the r-th vector of a random order: no two take the same while there are enough vectors.
    order_N = jax.random.permutation(key, z_NZ.shape[0])
    rank_K = (jnp.cumsum(dead_K) - 1) % z_NZ.shape[0]
    drawn_KZ = sharding.constrain(z_NZ[order_N[rank_K]], ("codes", None))
    codebook_KZ = jnp.where(dead_K[:, None], drawn_KZ, codebook_KZ)
    return codebook_KZ, stats._replace(age_K=jnp.where(dead_K, 0, stats.age_K)), dead_K
