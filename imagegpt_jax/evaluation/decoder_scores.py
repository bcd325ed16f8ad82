"""Scores of a decoder: how well it predicts tokens, and whether its pictures show what they should.

Shapes: P prompts, S samples of a prompt, N samples, H W C image.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imagegpt_jax import images, train_state
from imagegpt_jax.data import pipeline, sources
from imagegpt_jax.data.subset import Subset
from imagegpt_jax.errors import UserError
from imagegpt_jax.evaluation import checkpoint_data
from imagegpt_jax.evaluation.checkpoint_data import Data, Page, Scores, Settings, source_of
from imagegpt_jax.evaluation.image_sets import score_sets
from imagegpt_jax.generation.pipeline import Pipeline
from imagegpt_jax.generation.request import GenerationRequest
from imagegpt_jax.inference import loading
from imagegpt_jax.metrics import common, likelihood, retrieval, score
from imagegpt_jax.metrics.generation import GenerationEvaluator
from imagegpt_jax.metrics.metric import IMAGES, NOTHING, STATISTICS
from imagegpt_jax.metrics.sets import InMemory, SourceImages
from imagegpt_jax.parallel import sharding
from imagegpt_jax.runtime import progress
from imagegpt_jax.sampling.likelihood import FEATURES
from imagegpt_jax.tasks.decoder.batches import pack
from imagegpt_jax.tasks.decoder.train_step import token_nll

SHOWN_PROMPTS = 16  # on a page


class DecoderScorer:
    """A decoder, the data that it predicts, and the pictures with prompts that it is to draw."""

    def __init__(self, settings: Settings, path: str):
        """Opens the data; raises UserError if they are not there, or nothing says which they are."""
        self._settings, self._path = settings, path
        self._data = checkpoint_data.open_data(settings, path, None)
        self._prompted: Data | None = None
        if settings.generation_prompts:
            config = checkpoint_data.config_of(path)
            spec = source_of(settings.generation_data or config.data.train)
            self._prompted = Data(spec, sources.open_source(spec, require="image"))
            sources.open_source(spec, require="label" if _by_class(config) else "captions")

    def score(self, mesh: Mesh, page: Page) -> Scores:
        """Likelihoods, and scores of samples where there are prompts."""
        settings = self._settings
        decoder = loading.load_decoder(self._path, settings.step, tokenizer=settings.tokenizer or None)
        tok = decoder.load_tokenizer()
        data, prompted = (data and data.numbered(decoder.setup.labels) for data in (self._data, self._prompted))
        assert data is not None
        self._data = data
        scores = self._likelihoods(decoder, tok, mesh)
        return scores if prompted is None else scores | self._generation(decoder, tok, prompted, page)

    # ----------------------------------------------------------------------------------------------------- likelihoods

    def _likelihoods(self, decoder: loading.Decoder, tok: loading.Tokenizer, mesh: Mesh) -> Scores:
        config, source, settings = decoder.config, self._data.source, self._settings
        made_by = getattr(source, "info", {}).get("tokenizer", tok.fingerprint)
        if made_by != tok.fingerprint:
            raise UserError(
                f"the token shards {source.name} were made by another tokenizer ({made_by}) than {tok.path or 'this'}"
                f" ({tok.fingerprint}): encode them again, or name their tokenizer by --tokenizer."
            )
        ops, setup = settings.ops or config.data.eval_ops, decoder.setup

        def packed() -> Iterator[dict[str, np.ndarray]]:
            for batch in checkpoint_data.batches(settings, "decoder", self._data, ops, mesh):
                codes = batch["codes"] if "codes" in batch else tok.encode(batch["image"], value_range=(-1, 1))
                rest = {name: value for name, value in batch.items() if name != "image"}
                features = decoder.read([str(c) for c in batch.get("caption", [""] * len(codes))])
                prefix = {} if features is None else dict(zip(FEATURES, features, strict=True))
                yield pack(decoder.setup, {**rest, "codes": codes}, train=False) | prefix

        columns = likelihood.COLUMNS
        if decoder.setup.layout.target_positions:
            columns = (*columns, "target_positions")
        if decoder.setup.encoder is not None:
            columns = (*columns, *FEATURES)
        evaluator = likelihood.LikelihoodEvaluator(
            lambda params, batch: (
                token_nll(setup, setup.networks["decoder"].module(params["decoder"]), batch),
                batch["targets"],
            ),
            packed,
            decoder.setup.space.vocab_size,
            mesh,
            columns,
            rows=checkpoint_data.ROWS,
        )
        with jax.set_mesh(mesh):
            params = common.to_host(train_state.split(decoder.gpt)[1])
            whole = jax.device_put(params, sharding.replicated(mesh))
            scores = dict(evaluator.evaluate({"decoder": whole}, decoder.step).scores)
        if "image_bits_per_token" in scores:
            height, width = config.data.grid
            numbers = 3 * height * width * tok.downsample**2  # of a picture
            bits = scores["image_bits_per_token"] * scores["image_tokens"]
            scores["image_bits_per_dim"] = bits / (len(source) * numbers)
        about = {
            "checkpoint": decoder.path,
            "step": decoder.step,
            "fingerprint": decoder.fingerprint(),
            "tokenizer_checkpoint": tok.path,
            "tokenizer_fingerprint": tok.fingerprint,
            **self._data.about,
            "images": len(source),
        }
        return {
            f"decoder/{name if name in about or name.startswith('unigram') else f'val_{name}'}": value
            for name, value in (about | scores).items()
        }

    # ------------------------------------------------------------------------------------------------------ generation

    def _generation(self, decoder: loading.Decoder, tok: loading.Tokenizer, data: Data, page: Page) -> Scores:
        """Retrieval of samples, and their metrics as a set."""
        config, settings, each = decoder.config, self._settings, self._settings.samples_per_prompt or 4
        use_labels = _by_class(config)
        subset = _distinct(data, settings, use_labels)
        records = subset.__getitems__(range(len(subset)))
        read = pipeline.Batches(
            subset, ops=config.data.eval_ops, batch_size=len(subset), shuffle=False, epochs=1, columns=("image",)
        )
        references_PHWC = images.to_uint8(next(iter(read))["image"])
        read.close()
        prompts = [decoder.setup.labels[r["label"]] if use_labels else r["captions"][0] for r in records]
        wanted: dict[str, Any] = {"settings": settings.sampler, "seed": settings.seed, "num_images": each}
        if use_labels:
            wanted |= {"mode": "class_conditional", "classes": tuple(record["label"] for record in records)}
        else:
            wanted["prompts"] = tuple(prompts)
        sampling = decoder.sampling(**settings.sampler)

        def draw(params: Mapping[str, Any]) -> np.ndarray:
            del params  # the decoder has them
            drawn = []
            with progress.bar(total=len(records) * each, desc="generation", unit="image") as bar:
                for part in Pipeline(decoder, tok).prepare(GenerationRequest(**wanted))(0):
                    drawn.append(part.pixels)
                    bar.update(len(part))
            return np.concatenate(drawn)

        evaluator = GenerationEvaluator(draw, prompted_PHWC=references_PHWC, seed=settings.seed)
        evaluation = evaluator.evaluate({}, decoder.step)
        samples_NHWC = evaluation.details["samples"]
        about = {
            **data.about,
            "prompts": len(records),
            "samples_per_prompt": each,
            "seed": settings.seed,
            "filter": f"box {retrieval.THUMBNAIL} x {retrieval.THUMBNAIL}",
            **dataclasses.asdict(sampling),
        }
        scores: Scores = {f"generation/{name}": value for name, value in {**about, **evaluation.scores}.items()}
        if settings.metrics:
            scores |= self._score_set(config, samples_NHWC, references_PHWC)
        of_prompt = samples_NHWC.reshape(len(records), each, *samples_NHWC.shape[1:])
        shown = list(zip(prompts, references_PHWC, of_prompt, strict=True))[:SHOWN_PROMPTS]
        page.pictures["generations"] = images.grid([images.Tile(p, [real, *samples]) for p, real, samples in shown])
        if settings.report:
            training = source_of(config.data.train)
            trained_on = sources.open_source(training, require="image")
            page.samples = (
                InMemory("samples", samples_NHWC, [prompt for prompt in prompts for _ in range(each)]),
                SourceImages(training, trained_on, config.data.eval_ops),
            )
        return scores

    def _score_set(self, config: Any, samples_NHWC: np.ndarray, references_PHWC: np.ndarray) -> Scores:
        """Metrics of sets: of the samples against unseen images; as a control, of the prompts' own pictures."""
        settings = self._settings
        names = [n for n in settings.metrics if score.find(n).reference in (NOTHING, IMAGES, STATISTICS)]
        spec = source_of(self._data.spec)
        unseen = SourceImages(spec, sources.open_source(spec, require="image"), config.data.eval_ops)
        scores = score_sets(settings, "samples", names, InMemory("samples", samples_NHWC), unseen)
        prompted = InMemory("the prompts' pictures", references_PHWC)
        control = score_sets(settings, "samples", names, prompted, unseen)
        keys = [f"samples/{name}" for name in names]
        return scores | {f"{key}_real": control[key] for key in keys if key in control}  # in the first process


def _by_class(config: Any) -> bool:
    """Whether a decoder draws classes, not words."""
    return config.data.text_length <= int(config.data.use_labels)


def _distinct(data: Data, settings: Settings, use_labels: bool) -> Subset:
    """Records that show different things: their concept where the set knows it, else their class or caption."""
    source = data.source

    def shown(numbers: Sequence[int]) -> list[Any]:
        records = source.__getitems__(numbers)
        return [r["label"] if use_labels else r.get("concept", r["captions"][0]) for r in records]

    chosen = retrieval.choose_distinct(shown, len(source), settings.generation_prompts, settings.seed)
    return Subset(source, chosen.tolist())
