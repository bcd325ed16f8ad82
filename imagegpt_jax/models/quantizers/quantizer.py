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

from imagegpt_jax.errors import UserError
from imagegpt_jax.models import layers
from imagegpt_jax.models.quantizers.codebook import l2_normalize
from imagegpt_jax.models.quantizers.config import Codebook, QuantizerConfig
from imagegpt_jax.models.quantizers.use import UseSums
from imagegpt_jax.parallel import sharding


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
    losses: dict[str, Float[Array, ""]]
    loss: Float[Array, ""]


class Quantizer(nnx.Module):
    """A quantizer; kinds with a codebook keep it as `embedding` [I, Z], float32 or float64, one group after another."""

    def __init__(self, config: QuantizerConfig, *, param_dtype: Any = "float32", key: jax.Array):
        self.config = config
        if (init := config.rules.init) is not None:
            self.embedding = nnx.Param(init(config, param_dtype, key), axes=("codebook", "code_dim"))

    def codebook(self) -> Float[Array, "I Z"]:
        """The learned codes as they are compared and decoded: normalised if the config says so."""
        codebook_IZ = sharding.constrain(self.embedding[...], ("codes", None))
        return l2_normalize(codebook_IZ) if self.config.l2_normalize else codebook_IZ

    def lookup(self, codes: Int[Array, "..."]) -> Float[Array, "... Z"]:
        """Indices, in the order of `Quantized.codes` -> vectors."""
        config = self.config
        ids = codes.reshape(*codes.shape[:-1], -1, config.groups, config.depth)
        parts = config.rules.lookup(config, self.codebook, ids)
        return parts.sum(axis=-2).reshape(*parts.shape[:-3], config.code_dim)

    def nearest(self, z: Float[Array, "... Z"]) -> Int[Array, "..."]:
        """Vectors -> indices, int32, in the order of `Quantized.codes`."""
        nearest = self.config.rules.nearest
        groups = [nearest(self.config, self._codebook_of(g), z_NZ)[0] for g, z_NZ in enumerate(self._compared(z))]
        return self._joined(groups, z.shape)

    def _compared(self, z: Float[Array, "... Z"]) -> list[Float[Array, "N Z"]]:
        """The groups of all vectors, as they are compared."""
        z = z.astype(layers.accumulation_dtype(z.dtype)).reshape(-1, z.shape[-1])
        parts = jnp.split(z, self.config.groups, axis=-1) if self.config.groups > 1 else [z]
        return [l2_normalize(part) if self.config.l2_normalize else part for part in parts]

    def _codebook_of(self, group: int) -> Codebook:
        def codebook() -> Float[Array, "K Z"]:
            codebook_IZ, K = self.codebook(), self.config.num_codes
            return codebook_IZ if self.config.groups == 1 else codebook_IZ[group * K : (group + 1) * K]

        return codebook

    def _joined(self, groups: list[Int[Array, "N D"]], shape: tuple[int, ...]) -> Int[Array, "..."]:
        """Codes of each group -> indices beside each other."""
        ids = [codes_ND + g * self.config.num_codes for g, codes_ND in enumerate(groups)]
        return jnp.concatenate(ids, axis=1).reshape(*shape[:-2], shape[-2] * self.config.codes_per_vector)

    # ------------------------------------------------------------------------------------------------ training

    def __call__(self, z: Float[Array, "... Z"]) -> Quantized:
        """Quantizes vectors; the input has two dimensions or more."""
        config = self.config
        quantize = config.rules.quantize
        groups = [quantize(config, self._codebook_of(g), z_NZ) for g, z_NZ in enumerate(self._compared(z))]
        # Each is a mean over vectors and dimensions, so their mean is that over all groups.
        losses = {n: jnp.asarray(sum(g.losses[n] for g in groups)) / config.groups for n in groups[0].losses}
        weights = {
            "commitment": config.commitment_weight,
            "codebook": config.codebook_weight,
            "index": config.index_weight,
            "entropy": config.entropy_weight,
        }
        if unknown := losses.keys() - weights.keys():
            raise UserError(
                f"kind={config.kind!r} has losses without weights, {sorted(unknown)}: name them {sorted(weights)}."
            )
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
