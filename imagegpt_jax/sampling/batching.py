"""Any number of samples through programs of one size: fixed-size batches, on one device or on every device of a mesh.

Sample i depends only on (seed, i): a device always decodes batches of the same size, the last one filled up with its
last sample. So an image does not depend on how many others are made beside it, nor on the number of devices.

Shapes: B samples, N tokens, G prompts of a sample.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt import GPT
from imagegpt_jax.models.gpt import Sequence as Sequence_
from imagegpt_jax.parallel import padding, sharding
from imagegpt_jax.sampling import engine, parallel, speculative
from imagegpt_jax.sampling.decode_weights import prepare, prepared
from imagegpt_jax.sampling.jobs import Job
from imagegpt_jax.sampling.settings import Sampling
from imagegpt_jax.sampling.token_sampling import Filters

BATCH_SIZE = 8  # samples that a device decodes at once
OnStep = Callable[[int, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Samples:
    """What was sampled.

    Attributes:
      tokens: int32 [B, N], numbers within the ids that may be drawn.
      log_likelihood: float32 [B], see `engine.State`.
      forward_passes: int32 [B], how often each sample went through the network, its prompt included.
    """

    tokens: np.ndarray
    log_likelihood: np.ndarray
    forward_passes: np.ndarray


def place(gpt: GPT, weights: str = "", mesh: Mesh | None = None) -> GPT:
    """`prepare`, with every device of a mesh holding all parameters, but for those that `tensor` cuts.

    Raises UserError if heads, columns or the vocabulary do not divide over `tensor`.
    """
    if prepared(gpt):
        return gpt
    if mesh is None:
        return prepare(gpt, weights)
    config = gpt.config
    sharding.check_divides(
        {"model.heads": config.heads, "model.kv_heads": config.num_kv_heads, "model.mlp_width": config.mlp_width},
        "tensor",
        mesh,
    )
    devices = set(mesh.devices.flat)
    if any(set(leaf.sharding.device_set) != devices for leaf in jax.tree.leaves(gpt)):
        gpt = jax.device_put(gpt, sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        make = functools.partial(prepare, weights=weights)
        return jax.jit(make, out_shardings=sharding.tensor_shardings(jax.eval_shape(make, gpt), mesh))(gpt)


def run(
    gpt: GPT,
    job: Job,
    sampling: Sampling,
    seed: int = 0,
    *,
    sample_indices: Sequence[int] | np.ndarray | None = None,
    batch_size: int = BATCH_SIZE,
    mesh: Mesh | None = None,
    on_step: OnStep | None = None,
) -> Samples:
    """Decodes a job, a batch on every device at a time.

    Args:
      gpt: the decoder, as trained or from `place`.
      job: what to decode.
      sampling: how to draw.
      seed: with the sample's index, all that its draws depend on.
      sample_indices: index of each sample (default 0, 1, ...).
      batch_size: samples that a device decodes at once.
      mesh: devices to decode on: rows are sharded over its `data` and `fsdp` axes, heads and matrices over `tensor`. By
        default the device that the parameters are on.
      on_step: called after every token with (tokens drawn, those of all samples of the batch [b, N], zero where not
        yet drawn); this leaves the compiled loop at every token.

    A decoder that was trained in random order samples unknown codes after the known ones (those of all or most of the
    samples), wherever they are.

    Raises:
      UserError: for a batch_size below 1, sample indices of another number than the samples, or settings that this
        decoder or this job is not for.
    """
    total = job.total
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    indices = np.arange(total) if sample_indices is None else np.asarray(sample_indices)
    if indices.shape != (total,):
        raise UserError(f"sample_indices has {indices.size} entries for {total} samples.")
    _check(gpt, job, sampling, on_step is not None)
    gpt = place(gpt, sampling.weights, mesh)
    steps, order = len(job.offsets), _order(gpt, job, sampling, seed)
    given = None if job.given is None else job.given[:, order]
    job = dataclasses.replace(job, offsets=job.offsets[order], given=given)
    shape, settings = plan(job, sampling)
    keys = sample_keys(seed, indices)
    devices = 1 if mesh is None else sharding.batch_shards(mesh)
    results = Samples(np.zeros((total, steps), np.int32), np.zeros(total, np.float32), np.full(total, steps, np.int32))

    def placed(tokens: jax.Array, count: int) -> np.ndarray:
        tokens_BN = np.zeros((count, steps), np.int32)
        tokens_BN[:, order] = _fetch(tokens)[:count]
        return tokens_BN

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for part, samples in padding.padded_batches(total, batch_size * devices):
            count = part.stop - part.start
            rows = rows_of(job, keys, samples.reshape(devices, batch_size), mesh)
            if sampling.speculative:
                drawn = speculative.decode(gpt, rows, settings, shape=shape, window=sampling.speculative)
                results.forward_passes[part] = _fetch(drawn[2])[:count]
            elif sampling.tokens_per_step > 1:
                drawn = parallel.decode(gpt, rows, settings, shape=shape, tokens_per_step=sampling.tokens_per_step)
                results.forward_passes[part] = -(-steps // sampling.tokens_per_step)
            else:
                see = None if on_step is None else lambda i, tokens, count=count: on_step(i, placed(tokens, count))
                drawn = _one_by_one(gpt, rows, settings, shape, see)
            results.tokens[part] = placed(drawn[0], count)
            results.log_likelihood[part] = _fetch(drawn[1])[:count]
    return results


def _one_by_one(
    gpt: GPT,
    rows: engine.Rows,
    settings: engine.Settings,
    shape: engine.Shape,
    see: Callable[[int, jax.Array], None] | None,
) -> tuple[jax.Array, jax.Array]:
    """Tokens and their log-likelihoods by the plain loop; `see` is called with each number of tokens and all tokens."""
    state = engine.start(gpt, rows, settings, shape=shape)
    if see is not None:
        see(1, state.drawn)
    drawn = 1
    for capacity, end in engine.cache_segments(engine.prompt_slots(gpt, rows.prompt), len(settings.offsets)):
        if capacity > state.cache.capacity:
            state = engine.grow(state, capacity)
        for stop in [end] if see is None else range(drawn + 1, end + 1):
            state = engine.advance(gpt, rows, settings, state, stop, shape=shape)
            if see is not None:
                see(stop, state.drawn)
        drawn = end
    return state.drawn, state.log_likelihood


def _check(gpt: GPT, job: Job, sampling: Sampling, watched: bool) -> None:
    if sampling.tokens_per_step > 1 and not gpt.config.target_positions:
        raise UserError(
            f"tokens_per_step={sampling.tokens_per_step} needs a decoder trained in random order"
            " (model.target_positions): leave it at 1, or try speculative=4."
        )
    if sampling.tokens_per_step > 1 and not job.any_order:
        raise UserError(
            f"tokens_per_step={sampling.tokens_per_step} is for codes of pictures: words are drawn one after another."
        )
    if watched and (sampling.speculative or sampling.tokens_per_step > 1):
        raise UserError("every single token is seen only where they are drawn one after another: leave on_step out.")


def _order(gpt: GPT, job: Job, sampling: Sampling, seed: int) -> np.ndarray:
    """The number of the token that is drawn first, of the second, ...: int [N]."""
    order = np.arange(len(job.offsets))
    if not gpt.config.target_positions or not job.any_order:
        return order
    if sampling.tokens_per_step > 1:  # codes of one pass do not know of each other, and should be far apart
        order = np.random.default_rng(seed).permutation(order)
    if job.given is None:
        return order
    share_N = np.mean(job.given != engine.UNKNOWN, axis=0)
    return order[np.argsort(-share_N[order], kind="stable")]


def plan(job: Job, sampling: Sampling) -> tuple[engine.Shape, engine.Settings]:
    """What is the same for all batches of a job."""
    shape = engine.Shape(job.start, job.size, len(job.prompts), job.without is not None, sampling.no_repeat_ngram_size)
    guidance = jnp.asarray(sampling.guidance(len(job.offsets)))
    bias = None if job.bias is None else jnp.asarray(job.bias)
    return shape, engine.Settings(jnp.asarray(job.offsets), Filters.of(sampling), guidance, bias)


def sample_keys(seed: int, indices: np.ndarray) -> jax.Array:
    """The key of each sample."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices, jnp.uint32))


def rows_of(job: Job, keys: jax.Array, samples_DT: np.ndarray, mesh: Mesh | None = None) -> engine.Rows:
    """The rows of T samples on each of D devices: device by device, on each prompt by prompt."""
    groups = [*job.prompts, job.without] if job.without else job.prompts
    packed = {
        name: np.concatenate([group[name][samples_T] for samples_T in samples_DT for group in groups])
        for name in job.prompts[0]
    }
    flat = samples_DT.reshape(-1)
    mix, given = jax.tree.map(lambda values: jnp.asarray(values[flat]), (job.mix, job.given))  # None stays None
    rows = engine.Rows(Sequence_.from_batch(packed), keys[flat], mix, given)
    return rows if mesh is None else _spread(mesh)(rows)


@functools.cache
def _spread(mesh: Mesh) -> Callable[[engine.Rows], engine.Rows]:
    """A program that cuts rows, the same on every process, over a mesh."""
    return jax.jit(lambda rows: rows, out_shardings=sharding.batch_sharding(mesh))


def _fetch(array: jax.Array) -> np.ndarray:
    """All of an array, also where other processes hold parts of it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
