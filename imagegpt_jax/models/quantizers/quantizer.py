"""The quantizer module: vectors -> codes, losses and counts of use; indices -> codes.

Numbers are float32, or float64 if the vectors or the codebook are.

Shapes: N vectors (any leading dimensions flattened), Z numbers in a vector (of a group, within one), G groups, D depth,
P = G D codes of a vector, K codes of a group, I = G K different indices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from imagegpt_jax.models import layers
from imagegpt_jax.models.quantizers import lattice
from imagegpt_jax.models.quantizers.codebook import (
    DOT,
    EUCLIDEAN,
    entropy_loss,
    l2_normalize,
    nearest_codes,
    soft_codes,
)
from imagegpt_jax.models.quantizers.config import QuantizerConfig
from imagegpt_jax.models.quantizers.use import UseSums
from imagegpt_jax.parallel import sharding

Losses = dict[str, Float[Array, ""]]


class Quantized(NamedTuple):
    """Result of quantizing.

    Attributes:
      zq: the chosen codes, shaped like the input; their gradient goes to the input as the kind of quantizer has it.
      codes: int32 indices of the chosen codes, those of one vector beside each other: where a vector has P codes, the
        last dimension is P times that of the input without its Z. In the order (group, depth).
      vectors: what was compared with codes (normalised if the codes are; with depth what was left over), without
        gradient; `learn` draws from them.
      sums: how often each code was chosen in the (global) batch, and what else adds up over it.
      losses: unweighted terms: "commitment", "codebook", "index" and "entropy", those that the quantizer has.
      loss: their weighted sum, to be added to the training loss.
    """

    zq: Float[Array, "... Z"]
    codes: Int[Array, "..."]
    vectors: Float[Array, "... P Z"]
    sums: UseSums
    losses: Losses
    loss: Float[Array, ""]


class _Group(NamedTuple):
    """What quantizing one group of every vector gives."""

    zq_NZ: Float[Array, "N Z"]
    codes_ND: Int[Array, "N D"]
    vectors_NDZ: Float[Array, "N D Z"]
    losses: Losses


class Quantizer(nnx.Module):
    """A quantizer; kinds with a codebook keep it as `embedding` [I, Z], float32 or float64, one group after another."""

    def __init__(self, config: QuantizerConfig, *, param_dtype: Any = "float32", key: jax.Array):
        self.config = config
        if not config.has_table:
            return
        shape = (config.num_ids, config.group_dim)
        codebook_IZ = jax.random.uniform(key, shape, param_dtype, -1 / config.num_codes, 1 / config.num_codes)
        codebook_IZ = l2_normalize(codebook_IZ) if config.l2_normalize else codebook_IZ
        self.embedding = nnx.Param(codebook_IZ, axes=("codebook", "code_dim"))

    def codebook(self) -> Float[Array, "I Z"]:
        """The learned codes as they are compared and decoded: normalised if the config says so."""
        codebook_IZ = sharding.constrain(self.embedding[...], ("codes", None))
        return l2_normalize(codebook_IZ) if self.config.l2_normalize else codebook_IZ

    def lookup(self, codes: Int[Array, "..."]) -> Float[Array, "... Z"]:
        """Indices, in the order of `Quantized.codes` -> vectors."""
        config = self.config
        parts = self._codes_of(codes.reshape(*codes.shape[:-1], -1, config.groups, config.depth))
        return parts.sum(axis=-2).reshape(*parts.shape[:-3], config.code_dim)

    def _codes_of(self, ids: Int[Array, "..."]) -> Float[Array, "... Z"]:
        """The code of each index, whatever group it is of."""
        config = self.config
        if config.has_table:
            return jnp.take(self.codebook(), ids, axis=0)
        if config.kind == "fsq":
            return lattice.fsq_lookup(ids % config.num_codes, config.levels, jnp.dtype("float32"))
        value = lattice.sign_value(config.group_dim, config.l2_normalize)
        return lattice.sign_lookup(ids % config.num_codes, config.group_dim, value, jnp.dtype("float32"))

    def nearest(self, z: Float[Array, "... Z"]) -> Int[Array, "..."]:
        """Vectors -> indices, int32, in the order of `Quantized.codes`."""
        groups = [self._nearest(g, z_NZ)[0] for g, z_NZ in enumerate(self._compared(z))]
        return self._joined(groups, z.shape)

    def _compared(self, z: Float[Array, "... Z"]) -> list[Float[Array, "N Z"]]:
        """The groups of all vectors, as they are compared."""
        z = z.astype(layers.accumulation_dtype(z.dtype)).reshape(-1, z.shape[-1])
        parts = jnp.split(z, self.config.groups, axis=-1) if self.config.groups > 1 else [z]
        return [l2_normalize(part) if self.config.l2_normalize else part for part in parts]

    def _codebook_of(self, group: int) -> Float[Array, "K Z"]:
        codebook_IZ, K = self.codebook(), self.config.num_codes
        return codebook_IZ if self.config.groups == 1 else codebook_IZ[group * K : (group + 1) * K]

    def _nearest(self, group: int, z_NZ: Float[Array, "N Z"]) -> tuple[Int[Array, "N D"], Float[Array, "N D Z"]]:
        """(codes within the group, what each was chosen for), without gradient."""
        config, rest_NZ = self.config, lax.stop_gradient(z_NZ)
        if config.kind == "fsq":
            return lattice.fsq_round(rest_NZ, config.levels)[1][:, None], rest_NZ[:, None]
        if config.kind == "lfq":
            return lattice.sign_codes(rest_NZ, 1.0)[1][:, None], rest_NZ[:, None]
        codebook_KZ = lax.stop_gradient(self._codebook_of(group))
        metric = DOT if config.kind == "ibq" else EUCLIDEAN
        codes, rests = [], []
        for level in range(config.depth):
            if level:
                rest_NZ = rest_NZ - jnp.take(codebook_KZ, codes[-1], axis=0)
            rests.append(rest_NZ)
            codes.append(nearest_codes(rest_NZ, codebook_KZ, config.chunk_codes, metric))
        return jnp.stack(codes, axis=1), jnp.stack(rests, axis=1)

    def _joined(self, groups: list[Int[Array, "N D"]], shape: tuple[int, ...]) -> Int[Array, "..."]:
        """Codes of each group -> indices beside each other."""
        ids = [codes_ND + g * self.config.num_codes for g, codes_ND in enumerate(groups)]
        return jnp.concatenate(ids, axis=1).reshape(*shape[:-2], shape[-2] * self.config.codes_per_vector)

    # ------------------------------------------------------------------------------------------------ training

    def __call__(self, z: Float[Array, "... Z"]) -> Quantized:
        """Quantizes vectors; the input has two dimensions or more."""
        config = self.config
        quantize = {"vq": self._vq, "ibq": self._ibq, "fsq": self._fsq, "lfq": self._lfq}[config.kind]
        groups = [quantize(g, z_NZ) for g, z_NZ in enumerate(self._compared(z))]
        # Each is a mean over vectors and dimensions, so their mean is that over all groups.
        losses = {n: jnp.asarray(sum(g.losses[n] for g in groups)) / config.groups for n in groups[0].losses}
        weights = {
            "commitment": config.commitment_weight,
            "codebook": config.codebook_weight,
            "index": config.index_weight,
            "entropy": config.entropy_weight,
        }
        zq_NZ = jnp.concatenate([g.zq_NZ for g in groups], axis=-1) if len(groups) > 1 else groups[0].zq_NZ
        vectors_NPZ = jnp.concatenate([g.vectors_NDZ for g in groups], axis=1)
        codes = self._joined([g.codes_ND for g in groups], z.shape)
        return Quantized(
            zq=zq_NZ.reshape(z.shape),
            codes=codes,
            vectors=lax.stop_gradient(vectors_NPZ).reshape(*z.shape[:-1], *vectors_NPZ.shape[1:]),
            sums=self._sums(codes.reshape(-1), vectors_NPZ),
            losses=losses,
            loss=jnp.asarray(sum((weights[n] * loss for n, loss in losses.items()), jnp.zeros((), zq_NZ.dtype))),
        )

    def _sums(self, ids: Int[Array, "NP"], vectors_NPZ: Float[Array, "N P Z"]) -> UseSums:
        config = self.config
        counts_I = jnp.zeros(config.num_ids, jnp.float32).at[ids].add(1.0)
        if config.codebook_update != "ema":
            return UseSums(counts_I, None)
        rows = lax.stop_gradient(vectors_NPZ).reshape(-1, config.group_dim)
        return UseSums(counts_I, jnp.zeros((config.num_ids, config.group_dim), rows.dtype).at[ids].add(rows))

    def _vq(self, group: int, z_NZ: Float[Array, "N Z"]) -> _Group:
        """Nearest codes, one after another for what is left over.

        Losses follow VQ-VAE (arXiv:1711.00937, equation 3), as means over vectors and dimensions, summed over depths
        (arXiv:2203.01941, equation 8).
        """
        config, codebook_KZ = self.config, self._codebook_of(group)
        codes_ND, rests_NDZ = self._nearest(group, z_NZ)
        parts = [
            sharding.constrain(jnp.take(codebook_KZ, codes_ND[:, d], axis=0), ("batch", None))
            for d in range(config.depth)
        ]
        zq_NZ, commitment, learned = parts[0], 0.0, 0.0
        for level, part_NZ in enumerate(parts):
            zq_NZ = zq_NZ if level == 0 else zq_NZ + part_NZ
            commitment += jnp.mean(jnp.square(z_NZ - lax.stop_gradient(zq_NZ)))
            learned += jnp.mean(jnp.square(lax.stop_gradient(rests_NDZ[:, level]) - part_NZ))
        losses: Losses = {"commitment": jnp.asarray(commitment)}
        if config.codebook_update == "gradient":
            losses["codebook"] = jnp.asarray(learned)
        if config.entropy_weight:
            losses["entropy"] = entropy_loss(z_NZ, codebook_KZ, config.entropy_temperature, config.chunk_codes)
        return _Group(_straight_through(zq_NZ, z_NZ), codes_ND, rests_NDZ, losses)

    def _ibq(self, group: int, z_NZ: Float[Array, "N Z"]) -> _Group:
        """Index backpropagation (arXiv:2412.02692): zq is the one-hot choice of the greatest z . code, times the codes;
        its gradient is that of the one-hot for the codes, and that of the softmax for the choice, so that every code
        gets some. "index" is |zq - z|^2 with that gradient, beside VQ's two losses.
        """
        config, codebook_KZ = self.config, self._codebook_of(group)
        codes_ND, rests_NDZ = self._nearest(group, z_NZ)
        hard_NZ = sharding.constrain(jnp.take(codebook_KZ, codes_ND[:, 0], axis=0), ("batch", None))
        soft_NZ = soft_codes(z_NZ, codebook_KZ, config.chunk_codes)
        zq_NZ = hard_NZ + (soft_NZ - lax.stop_gradient(soft_NZ))
        losses: Losses = {
            "index": jnp.mean(jnp.square(zq_NZ - z_NZ)),
            "commitment": jnp.mean(jnp.square(z_NZ - lax.stop_gradient(hard_NZ))),
            "codebook": jnp.mean(jnp.square(lax.stop_gradient(z_NZ) - hard_NZ)),
        }
        if config.entropy_weight:
            temperature = config.entropy_temperature
            losses["entropy"] = entropy_loss(z_NZ, codebook_KZ, temperature, config.chunk_codes, DOT)
        return _Group(zq_NZ, codes_ND, rests_NDZ, losses)

    def _fsq(self, group: int, z_NZ: Float[Array, "N Z"]) -> _Group:
        """Finite scalar quantization (arXiv:2309.15505): each number is bounded and rounded; there are no losses."""
        del group
        zq_NZ, codes_N = lattice.fsq_round(z_NZ, self.config.levels)
        return _Group(zq_NZ, codes_N[:, None], z_NZ[:, None], {})

    def _lfq(self, group: int, z_NZ: Float[Array, "N Z"]) -> _Group:
        """Signs (arXiv:2310.05737), with the commitment loss and the entropy loss of its equation 5."""
        del group
        config = self.config
        value = lattice.sign_value(config.group_dim, config.l2_normalize)
        zq_NZ, codes_N = lattice.sign_codes(lax.stop_gradient(z_NZ), value)
        losses: Losses = {"commitment": jnp.mean(jnp.square(z_NZ - zq_NZ))}
        if config.entropy_weight:
            losses["entropy"] = lattice.sign_entropy_loss(z_NZ, value, config.entropy_temperature)
        return _Group(_straight_through(zq_NZ, z_NZ), codes_N[:, None], z_NZ[:, None], losses)


def _straight_through(zq_NZ: Float[Array, "N Z"], z_NZ: Float[Array, "N Z"]) -> Float[Array, "N Z"]:
    # z - sg(z) is exactly zero, so training decodes the very values that `lookup` gives.
    return lax.stop_gradient(zq_NZ) + (z_NZ - lax.stop_gradient(z_NZ))
