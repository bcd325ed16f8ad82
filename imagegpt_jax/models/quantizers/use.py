"""Use of the codes over global batches, and what follows from it: moving-average codebooks, revival of dead codes.

Shapes: I different indices, Z numbers in a code, N vectors, P codes of a vector, G groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imagegpt_jax.models.quantizers.config import QuantizerConfig
from imagegpt_jax.parallel import sharding

# A code whose average count is below this keeps its place: there is nothing to average.
MIN_COUNT = 1e-5


class UseSums(NamedTuple):
    """What adds up over the parts of a batch.

    Attributes:
      counts_I: float32, how often each code was chosen.
      vectors_IZ: sum of the vectors that chose each code, for codebooks that are moving averages.
    """

    counts_I: Float[Array, "I"]
    vectors_IZ: Float[Array, "I Z"] | None


class QuantizerStats(NamedTuple):
    """Use of the codes in training, over global batches.

    Attributes:
      age_I: int32, steps since a vector last chose the code. All codes start old enough to be replaced, so that the
        first `revive` sets the whole codebook from the first batch (short trainings collapse without it).
      average_I: float32, moving average of how often a batch chooses the code (`codebook_decay`).
      step: int32, batches seen.
    """

    age_I: Int[Array, "I"]
    average_I: Float[Array, "I"]
    step: Int[Array, ""]


def init_stats(config: QuantizerConfig) -> QuantizerStats:
    """Statistics before the first batch."""
    return QuantizerStats(
        age_I=jnp.full(config.num_ids, config.revival_steps, jnp.int32),
        average_I=jnp.zeros(config.num_ids, jnp.float32),
        step=jnp.zeros((), jnp.int32),
    )


def learn(
    config: QuantizerConfig,
    codebooks: tuple[Float[Array, "I Z"], Float[Array, "I Z"]] | None,
    stats: QuantizerStats,
    sums: UseSums,
    vectors: Float[Array, "... P Z"],
    key: jax.Array,
) -> tuple[Float[Array, "I Z"] | None, QuantizerStats, Bool[Array, "I"]]:
    """What a training step does beside the optimizer's: statistics, the moving-average codebook, revival.

    `codebooks` are `embedding` before and after the optimizer's step, None for kinds without, or where it is frozen;
    `sums` and `vectors` are those of `Quantized`, of the whole batch; `key` is that of `revive`.

    Returns:
      The codebook after the step, the statistics, and which codes were replaced (what is kept per code, such as its
      moving average, should start anew there).
    """
    if (own := config.rules.learn) is not None:
        return own(config, codebooks, stats, sums, vectors, key)
    after = update_stats(config, stats, sums.counts_I)
    if codebooks is None:
        return None, after, jnp.zeros(config.num_ids, bool)
    before_IZ, codebook_IZ = codebooks
    if sums.vectors_IZ is not None:
        codebook_IZ = average_codebook(config, before_IZ, stats, after, sums.vectors_IZ)
    return revive(config, codebook_IZ, after, vectors, key)


def update_stats(config: QuantizerConfig, stats: QuantizerStats, counts_I: Float[Array, "I"]) -> QuantizerStats:
    """The statistics after a batch of which so many vectors chose each code."""
    # In the first batch the codes are still random: being chosen does not save one from `revive`.
    used_I = (counts_I > 0) & (stats.step > 0)
    decay = config.codebook_decay
    return QuantizerStats(
        age_I=jnp.where(used_I, 0, stats.age_I + 1),
        average_I=decay * stats.average_I + (1 - decay) * counts_I,
        step=stats.step + 1,
    )


def average_codebook(
    config: QuantizerConfig,
    codebook_IZ: Float[Array, "I Z"],
    before: QuantizerStats,
    after: QuantizerStats,
    vectors_IZ: Float[Array, "I Z"],
) -> Float[Array, "I Z"]:
    """The codebook of moving averages after a batch (arXiv:1711.00937, equations 6 to 8).

    A code is e = m / N, of the averages m of the vectors that chose it and N of their number. So m of the step before
    is e N, and need not be kept.
    """
    decay = config.codebook_decay
    sum_IZ = decay * before.average_I[:, None] * codebook_IZ + (1 - decay) * vectors_IZ
    moved_IZ = sum_IZ / jnp.maximum(after.average_I, MIN_COUNT)[:, None]
    return jnp.where(after.average_I[:, None] > MIN_COUNT, moved_IZ, codebook_IZ).astype(codebook_IZ.dtype)


def revive(
    config: QuantizerConfig,
    codebook_IZ: Float[Array, "I Z"],
    stats: QuantizerStats,
    vectors: Float[Array, "... P Z"],
    key: jax.Array,
) -> tuple[Float[Array, "I Z"], QuantizerStats, Bool[Array, "I"]]:
    """Replaces codes that were not chosen for `config.revival_steps` steps by vectors of the batch, drawn by `key`.

    A code is replaced by what was compared with the codes of its group, at any depth. Call it after the optimizer's
    update with the `Quantized.vectors` of the same step. The first call replaces all codes.

    Returns:
      The codebook, the statistics with the new codes' age at zero, and which codes were replaced.
    """
    if not config.revival_steps:
        return codebook_IZ, stats, jnp.zeros(config.num_ids, bool)
    G, Z = config.groups, config.group_dim
    vectors_GNZ = vectors.reshape(-1, G, config.depth, Z).swapaxes(0, 1).reshape(G, -1, Z).astype(codebook_IZ.dtype)
    count = vectors_GNZ.shape[1]
    dead_I = stats.age_I >= config.revival_steps
    # The r-th dead code takes the r-th vector of a random order: no two take the same while there are enough vectors.
    order_N = jax.random.permutation(key, count)
    rank_I = (jnp.cumsum(dead_I) - 1) % count
    group_I = jnp.arange(config.num_ids) // config.num_codes
    drawn_IZ = sharding.constrain(vectors_GNZ[group_I, order_N[rank_I]], ("codes", None))
    codebook_IZ = jnp.where(dead_I[:, None], drawn_IZ, codebook_IZ)
    stats = stats._replace(
        age_I=jnp.where(dead_I, 0, stats.age_I),
        average_I=jnp.where(dead_I, 1.0, stats.average_I),  # as if the vector had chosen it
    )
    return codebook_IZ, stats, dead_I
