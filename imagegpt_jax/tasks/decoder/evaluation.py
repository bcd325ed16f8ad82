"""What the decoder's stage measures while it trains: likelihood of the validation split, and pictures of prompts.

Shapes: B batch, L sequence, N image codes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imagegpt_jax import train_state
from imagegpt_jax.data import sources
from imagegpt_jax.images import Tile, grid, to_uint8
from imagegpt_jax.metrics import common, likelihood
from imagegpt_jax.metrics.evaluator import Evaluation, Evaluator
from imagegpt_jax.parallel import padding, sharding
from imagegpt_jax.sampling.batching import BATCH_SIZE, run
from imagegpt_jax.sampling.jobs import image_job
from imagegpt_jax.tasks import tokenizer as tokenizer_task
from imagegpt_jax.tasks.decoder.batches import PROMPTS, batches, encode
from imagegpt_jax.tasks.decoder.setup import Setup, sampling_of, tokenizer_params
from imagegpt_jax.tasks.decoder.train_step import token_nll


def predict_fns(setup: Setup) -> dict[str, Callable[..., Any]]:
    """Pure functions: "nll" of (parameters of "decoder", packed batch) -> [B, L] in nats."""
    net = setup.networks["decoder"]

    def nll(params: train_state.Params, batch: dict[str, jax.Array]) -> jax.Array:
        return token_nll(setup, net.module(params), batch)

    return {"nll": nll}


@dataclasses.dataclass(frozen=True)
class _Validation:
    """Scores the validation split of a run, and samples of its prompts."""

    setup: Setup
    mesh: Mesh

    def evaluate(self, params: Mapping[str, train_state.Params], step: int) -> Evaluation:
        del step
        return Evaluation(*evaluate(self.setup, params, self.mesh))


def evaluators(setup: Setup, mesh: Mesh) -> tuple[Evaluator, ...]:
    """What scores a decoder while it trains."""
    return (_Validation(setup, mesh),)


def evaluate(
    setup: Setup, params: Mapping[str, train_state.Params], mesh: Mesh
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Scores the validation split, and samples if `config.eval_samples`; also a grid of pictures for TensorBoard."""
    config = setup.config
    columns = likelihood.COLUMNS
    if "tokenizer" in setup.networks:
        columns = (*columns, "image")
    if "encoder" in setup.networks:
        columns = (*columns, *PROMPTS)
    if setup.layout.target_positions:
        columns = (*columns, "target_positions")
    rows = sharding.host_rows(mesh, config.eval_batch_size)
    scores = likelihood.evaluate(
        _scorer(setup),
        dict(params),
        batches(setup, "validation", batch_size=config.eval_batch_size, rows=rows),
        setup.space.vocab_size,
        mesh,
        columns,
    )
    images = {"samples": _sample_grid(setup, params["decoder"])[None]} if config.sample_prompts else {}
    if config.eval_samples:
        scores |= _score_samples(setup, params["decoder"], mesh)
    return {f"validation/{name}": value for name, value in scores.items()}, images


def _sample_grid(setup: Setup, params: train_state.Params) -> np.ndarray:
    """Four pictures of each of `config.sample_prompts`, captioned: uint8 [H, W, C], the same draws every time.

    Every process draws them on its first device, so that the mesh of the training does not matter.
    """
    config, first = setup.config, jax.local_devices()[:1]
    prompts = [prompt for prompt in config.sample_prompts for _ in range(4)]
    features = None if setup.encoder is None else setup.encoder.read(prompts)
    with jax.set_mesh(sharding.local_mesh(first)):
        params = jax.device_put(common.to_host(params), first[0])
        module: Any = setup.networks["decoder"].module(params)
        texts, sampling = setup.text.encode_batch(prompts), sampling_of(config)
        job = image_job(setup.layout, [(texts, None)], sampling, features=None if features is None else [features])
        codes_BN = run(module, job, sampling, config.seed, batch_size=len(prompts)).tokens
        pictures = to_uint8(np.asarray(_decoder_of_codes(setup)(codes_BN.reshape(-1, *setup.layout.grid))))
    tiles = [Tile(prompt, list(pictures[4 * i : 4 * i + 4])) for i, prompt in enumerate(config.sample_prompts)]
    return grid(tiles)


@functools.cache
def _decoder_of_codes(setup: Setup) -> Callable[[np.ndarray], jax.Array]:
    """Codes [B, h, w] -> pictures, with the image tokenizer's parameters read once."""
    params = tokenizer_params(setup)
    decode = jax.jit(tokenizer_task.predict_fns(setup.tokenizer)["decode"])
    return lambda codes_Bhw: decode(params, codes_Bhw)


# --------------------------------------------------------------------------------------------------- scores of samples

# Validation images that samples are compared with, at most; the first ones.
_REFERENCES = 10_000


def _score_samples(setup: Setup, params: train_state.Params, mesh: Mesh) -> dict[str, float]:
    """Draws `config.eval_samples` pictures of validation prompts on the mesh of the training, and scores them."""
    config, (texts, labels, _) = setup.config, _asked(setup)
    module: Any = setup.networks["decoder"].module(params)
    ids = setup.text.encode_batch(texts) if not config.data.use_labels or any(texts) else None
    features = None if setup.encoder is None else [setup.encoder.read(texts)]
    sampling = sampling_of(config)
    job = image_job(setup.layout, [(ids, labels)], sampling, features=features)
    codes_BN = run(module, job, sampling, config.seed, mesh=mesh).tokens
    return _sample_scorer(setup, mesh)(_pictures(setup, codes_BN, mesh))


def _asked(setup: Setup) -> tuple[list[str], list[int] | None, list[str]]:
    """Captions and classes to draw, evenly spread over the validation split, and what their pictures should show."""
    config, source = setup.config, setup.sources["validation"]
    count = min(config.eval_samples, len(source))
    records = sources.readable_records(source, np.linspace(0, len(source) - 1, count).astype(int).tolist())
    reads = config.data.text_length > int(config.data.use_labels)  # words, besides a class
    texts = [str(r["captions"][0]) if reads and r.get("captions") else "" for r in records]
    labels = [int(r["label"]) for r in records] if config.data.use_labels else None
    shown = [text or (setup.labels[r["label"]] if labels else "") for text, r in zip(texts, records, strict=True)]
    return texts, labels, shown


def _pictures(setup: Setup, codes_BN: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Codes -> uint8 [B, H, W, C], a tile on every device of the mesh at a time."""
    decode, params = _decode_on(setup, mesh)

    def dispatch(codes_Bhw: np.ndarray) -> jax.Array:
        return decode(params, jax.device_put(codes_Bhw, sharding.batch_sharding(mesh)))

    with jax.set_mesh(mesh):
        return padding.map_batches(
            dispatch,
            BATCH_SIZE * sharding.batch_shards(mesh),
            codes_BN.reshape(-1, *setup.layout.grid),
            fetch=lambda images_BHWC: to_uint8(common.to_host(images_BHWC)),
        )


@functools.cache
def _decode_on(setup: Setup, mesh: Mesh) -> tuple[Callable[..., Any], train_state.Params]:
    """The image tokenizer's decoder, with its parameters whole on every device."""
    params = tokenizer_params(setup)
    params = sharding.put_whole(params, jax.tree.map(lambda _: sharding.replicated(mesh), params))
    return jax.jit(tokenizer_task.predict_fns(setup.tokenizer)["decode"]), params


@functools.cache
def _sample_scorer(setup: Setup, mesh: Mesh) -> Any:
    """What scores samples, with the features of the reference computed once.

    The reference is the validation images, or what the image tokenizer makes of the codes where there are only those.
    """
    from imagegpt_jax.evaluation.checkpoint_data import Subset
    from imagegpt_jax.metrics import in_training, reconstructed

    config, source = setup.config, setup.sources["validation"]
    some = Subset(source, range(min(len(source), _REFERENCES)))
    name = f"{config.data.validation}, {len(some)} images"
    if "codes" in sources.first_record(source):
        codes_BN = np.stack([r["codes"].reshape(-1) for r in sources.readable_records(source, range(len(some)))])
        reference: Any = reconstructed.Held(name, _pictures(setup, codes_BN.astype(np.int32), mesh))
    else:
        reference = reconstructed.Decoded(name, some, config.data.eval_ops)
    return in_training.Scorer(config.eval_features, reference, _asked(setup)[2])


@functools.cache
def _scorer(setup: Setup) -> Callable[..., Any]:
    """The same function object every time, with which an evaluation keeps its compiled program."""
    nll = predict_fns(setup)["nll"]

    def score(params: dict[str, train_state.Params], batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        batch = encode(setup, params, batch)
        return nll(params["decoder"], batch), batch["targets"]

    return score
