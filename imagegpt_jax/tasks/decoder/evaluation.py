"""What scores a decoder while it trains: likelihood of the validation split, and pictures of prompts.

Shapes: B batch, L sequence, N image codes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imagegpt_jax import train_state
from imagegpt_jax.data import sources
from imagegpt_jax.data.subset import Subset
from imagegpt_jax.images import Tile, grid, to_uint8
from imagegpt_jax.metrics import common, likelihood
from imagegpt_jax.metrics.evaluator import Evaluation, Evaluator
from imagegpt_jax.metrics.sets import ImageSet, InMemory, SourceImages
from imagegpt_jax.parallel import padding, sharding
from imagegpt_jax.sampling.batching import BATCH_SIZE, run
from imagegpt_jax.sampling.jobs import image_job
from imagegpt_jax.tasks import tokenizer as tokenizer_task
from imagegpt_jax.tasks.decoder.batches import PROMPTS, batches, encode
from imagegpt_jax.tasks.decoder.setup import Setup, sampling_of, tokenizer_params
from imagegpt_jax.tasks.decoder.train_step import token_nll

Params = Mapping[str, train_state.Params]
# Validation images that samples are compared with, at most; the first ones.
_REFERENCES = 10_000


def evaluators(setup: Setup, mesh: Mesh) -> Sequence[Evaluator]:
    """Likelihoods; a grid of `config.sample_prompts` if there are any; scores of `config.eval_samples` samples."""
    config = setup.config
    made: list[Evaluator] = [_likelihood(setup, mesh)]
    if config.sample_prompts:
        made.append(_SampleGrid(setup))
    if config.eval_samples:
        made.append(_samples(setup, mesh))
    return made


def _likelihood(setup: Setup, mesh: Mesh) -> likelihood.LikelihoodEvaluator:
    size, columns = setup.config.eval_batch_size, likelihood.COLUMNS
    if "tokenizer" in setup.networks:
        columns = (*columns, "image")
    if "encoder" in setup.networks:
        columns = (*columns, *PROMPTS)
    if setup.layout.target_positions:
        columns = (*columns, "target_positions")

    def score(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        batch = encode(setup, params, batch)
        return token_nll(setup, setup.networks["decoder"].module(params["decoder"]), batch), batch["targets"]

    split = functools.partial(batches, setup, "validation", batch_size=size, rows=sharding.host_rows(mesh, size))
    vocab_size = setup.space.vocab_size
    return likelihood.LikelihoodEvaluator(score, split, vocab_size, mesh, columns, prefix="validation/")


class _SampleGrid:
    """Four pictures of each of `config.sample_prompts`, captioned, from the same random numbers every time.

    Every process draws them on its first device, so that the mesh of the training does not matter.
    """

    def __init__(self, setup: Setup):
        self._setup, self._device = setup, jax.local_devices()[0]
        self._decode = jax.jit(tokenizer_task.predict_fns(setup.tokenizer)["decode"])

    @functools.cached_property
    def _tokenizer(self) -> train_state.Params:
        return tokenizer_params(self._setup)

    def evaluate(self, params: Params, step: int) -> Evaluation:
        """The image `samples`, uint8 [1, H, W, C]."""
        setup, config = self._setup, self._setup.config
        prompts = [prompt for prompt in config.sample_prompts for _ in range(4)]
        features = None if setup.encoder is None else setup.encoder.read(prompts)
        with jax.set_mesh(sharding.local_mesh([self._device])):
            network = jax.device_put(common.to_host(params["decoder"]), self._device)
            module: Any = setup.networks["decoder"].module(network)
            texts, sampling = setup.text.encode_batch(prompts), sampling_of(config)
            classes = config.data.use_labels and all(prompt in setup.labels for prompt in prompts)
            drawn = (None, [setup.labels.index(prompt) for prompt in prompts]) if classes else (texts, None)
            job = image_job(setup.layout, [drawn], sampling, features=None if features is None else [features])
            codes_BN = run(module, job, sampling, config.seed, batch_size=len(prompts)).tokens
            codes_Bhw = codes_BN.reshape(-1, *setup.layout.grid)
            pictures = to_uint8(np.asarray(self._decode(self._tokenizer, codes_Bhw)))
        tiles = [Tile(prompt, list(pictures[4 * i : 4 * i + 4])) for i, prompt in enumerate(config.sample_prompts)]
        return Evaluation({}, {"samples": grid(tiles)[None]})


# --------------------------------------------------------------------------------------------------- scores of samples


def _samples(setup: Setup, mesh: Mesh) -> Evaluator:
    """Scores `config.eval_samples` pictures of validation prompts, drawn on the mesh of the training.

    They are compared with the validation images, or with what the image tokenizer makes of the codes where there are
    only those.
    """
    from imagegpt_jax.metrics import generation  # and with it all networks

    config, source = setup.config, setup.sources["validation"]
    texts, labels, captions = _validation_prompts(setup)
    decode = _CodesToImages(setup, mesh)

    def draw(params: Params) -> np.ndarray:
        module: Any = setup.networks["decoder"].module(params["decoder"])
        ids = setup.text.encode_batch(texts) if not config.data.use_labels or any(texts) else None
        features = None if setup.encoder is None else [setup.encoder.read(texts)]
        sampling = sampling_of(config)
        job = image_job(setup.layout, [(ids, labels)], sampling, features=features)
        return decode(run(module, job, sampling, config.seed, mesh=mesh).tokens)

    def held_out() -> ImageSet:
        some = Subset(source, range(min(len(source), _REFERENCES)))
        name = f"{config.data.validation}, {len(some)} images"
        if "codes" not in sources.first_record(source):
            return SourceImages(name, some, config.data.eval_ops)
        codes_BN = np.stack([r["codes"].reshape(-1) for r in sources.readable_records(source, range(len(some)))])
        return InMemory(name, decode(codes_BN.astype(np.int32)))

    return generation.GenerationEvaluator(
        draw, features=config.eval_features, captions=captions, held_out=held_out, prefix="validation/"
    )


def _validation_prompts(setup: Setup) -> tuple[list[str], list[int] | None, list[str]]:
    """Captions and classes to draw, evenly spread over the validation split, and what their pictures should show."""
    config, source = setup.config, setup.sources["validation"]
    count = min(config.eval_samples, len(source))
    records = sources.readable_records(source, np.linspace(0, len(source) - 1, count).astype(int).tolist())
    reads = config.data.text_length > int(config.data.use_labels)  # words, besides a class
    texts = [str(r["captions"][0]) if reads and r.get("captions") else "" for r in records]
    labels = [int(r["label"]) for r in records] if config.data.use_labels else None
    shown = [text or (setup.labels[r["label"]] if labels else "") for text, r in zip(texts, records, strict=True)]
    return texts, labels, shown


class _CodesToImages:
    """The image tokenizer's decoder over a mesh, with its parameters whole on every device."""

    def __init__(self, setup: Setup, mesh: Mesh):
        self._setup, self._mesh = setup, mesh
        self._decode = jax.jit(tokenizer_task.predict_fns(setup.tokenizer)["decode"])

    @functools.cached_property
    def _params(self) -> train_state.Params:
        params = tokenizer_params(self._setup)
        return sharding.put_whole(params, jax.tree.map(lambda _: sharding.replicated(self._mesh), params))

    def __call__(self, codes_BN: np.ndarray) -> np.ndarray:
        """Codes -> uint8 [B, H, W, C], so many on every device of the mesh at a time."""
        codes_Bhw = codes_BN.reshape(-1, *self._setup.layout.grid)
        layout = sharding.batch_sharding(self._mesh)

        def decode(rows_Bhw: np.ndarray) -> jax.Array:
            with jax.set_mesh(self._mesh):
                return self._decode(self._params, jax.device_put(rows_Bhw, layout))

        size = BATCH_SIZE * sharding.batch_shards(self._mesh)
        return padding.map_batches(decode, size, codes_Bhw, fetch=lambda images: to_uint8(common.to_host(images)))
