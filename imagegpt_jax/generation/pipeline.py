"""From a request to images: prompts and known codes -> token jobs -> the sampling engine -> pixels -> postprocessing.

Shapes: B entries of a request, b images of a batch, H W C image, N codes of an image, P features of width E.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np

import imagegpt_jax
from imagegpt_jax import images as images_lib
from imagegpt_jax.data.packing import NO_LABEL, Layout
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import modes, scorers
from imagegpt_jax.generation.arguments import Options, Pictures, is_pictures, mode_of, with_options
from imagegpt_jax.generation.arguments import request as make_request
from imagegpt_jax.generation.postprocess import Postprocessor
from imagegpt_jax.generation.request import GenerationRequest
from imagegpt_jax.generation.results import GeneratedImages
from imagegpt_jax.inference.loading import Decoder, Tokenizer
from imagegpt_jax.sampling import batching, beam
from imagegpt_jax.sampling.jobs import Features, Job, caption_job, image_job, until_end
from imagegpt_jax.sampling.settings import Sampling


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A decoder and the image tokenizer that it was trained with, which make images of requests.

    Raises:
      UserError: for a tokenizer that does not fit the decoder.
    """

    decoder: Decoder
    tokenizer: Tokenizer

    def __post_init__(self):
        gpt, tok = self.decoder, self.tokenizer
        if not isinstance(gpt, Decoder) or not isinstance(tok, Tokenizer):
            raise UserError("give a decoder from load_decoder and a tokenizer from load_tokenizer, in this order.")
        if gpt.setup.layout is None:
            raise UserError(f"{gpt.path} is a language model: it draws no pictures.")
        if tok.num_codes != gpt.setup.layout.space.num_codes:
            raise UserError(
                f"the tokenizer has {tok.num_codes} codes and the decoder was trained with"
                f" {gpt.setup.layout.space.num_codes}: give the tokenizer that the decoder was trained with."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that the decoder was trained on."""
        rows, columns = self.decoder.setup.layout.grid
        return rows * self.tokenizer.downsample, columns * self.tokenizer.downsample

    def grid(self, request: GenerationRequest) -> modes.Grid:
        """Rows and columns of the codes of a request's images, where its pictures are files."""
        rows, columns = request.grid or self.decoder.setup.layout.grid
        top, right, bottom, left = (margin // self.tokenizer.downsample for margin in request.margins or (0, 0, 0, 0))
        return rows + top + bottom, columns + left + right

    def sources(self, request: GenerationRequest) -> np.ndarray:
        """The pictures of a request: uint8 [B, H, W, C].

        Raises UserError for files that are none, or several shapes.
        """
        pictures = [image.load(self.size) for image in request.images]
        shapes = sorted({f"{picture.dtype} {picture.shape}" for picture in pictures})
        if len(shapes) != 1 or pictures[0].dtype != np.uint8 or pictures[0].ndim != 3:
            raise UserError(f"pictures are uint8 [H, W, C], all of one shape, and these are {', '.join(shapes)}.")
        return np.stack(pictures)

    def resolved(self, request: GenerationRequest) -> GenerationRequest:
        """The request with every setting of `Sampling`, those that it leaves to the decoder among them."""
        return dataclasses.replace(request, settings=dataclasses.asdict(self.decoder.sampling(**request.settings)))

    def prepare(
        self,
        request: GenerationRequest,
        *,
        features: Features | None = None,
        batch_size: int = batching.BATCH_SIZE,
        mesh: jax.sharding.Mesh | None = None,
        on_step: batching.OnStep | None = None,
    ) -> Callable[[int], Iterator[GeneratedImages]]:
        """Checks a request and reads its pictures; then its images are made a batch at a time.

        Args:
          request: what to generate.
          features: a text encoder's output [B, P, E] and its mask [B, P] in place of the prompts' own, for a decoder
            that has features before its codes.
          batch_size, mesh, on_step: see `sampling.batching.run`.

        Returns:
          a function that is given the number of the image to begin with. All images are `num_images` of the first
          entry, then of the second, and so on.

        Raises:
          UserError: for a request that does not fit the decoder.
        """
        if modes.check(request) is modes.MODES["caption"]:
            raise UserError("captions are no images: ask for them by captions().")
        request = self.resolved(request)
        sampling = Sampling(**request.settings)  # type: ignore[arg-type]
        postprocess, kept = Postprocessor(request.postprocess), request.num_images
        if request.best_of is not None and request.best_of < kept:
            raise UserError(f"best_of={request.best_of} must be at least num_images={kept}: so many are kept.")
        scorer = None if request.best_of is None else scorers.find(request.scorer)
        layout, known, job_of = self._read(request, sampling, features)
        each = request.best_of or kept
        indices = np.asarray(dataclasses.replace(request, num_images=each).indices())
        together = batch_size * (1 if mesh is None else mesh.size // mesh.shape["tensor"])
        how: dict[str, Any] = {"batch_size": batch_size, "mesh": mesh, "on_step": on_step}

        def parts(first: int) -> Iterator[GeneratedImages]:
            for start in range(first, len(indices), together):
                numbers = np.arange(start, min(start + together, len(indices)))
                entries, i_b = numbers // each, indices[numbers]
                gpt, job = self.decoder.placed(sampling.weights, mesh), job_of(entries)
                samples = batching.run(gpt, job, sampling, request.seed, sample_indices=i_b, **how)
                pixels = images_lib.to_uint8(self.tokenizer.decode(samples.tokens, layout.grid))
                if known is not None and known.source is not None and known.fresh is not None:
                    pixels = np.where(known.fresh[entries][..., None], pixels, known.source[entries])
                results = [{"log_likelihood": float(value)} for value in samples.log_likelihood]
                codes, likelihood = samples.tokens, samples.log_likelihood
                yield GeneratedImages(request, numbers, i_b, pixels, codes, likelihood, results)

        def finished(first: int = 0) -> Iterator[GeneratedImages]:
            if scorer is None:
                ready = parts(first)
            else:
                ready = iter([self._best(request, GeneratedImages.join(list(parts(0))), layout, scorer)])
            texts, _ = request.entries
            for part in ready:
                pairs = [postprocess(p, texts[n // kept]) for p, n in zip(part.pixels, part.numbers, strict=True)]
                results = [{**r, **checks} for r, (_, checks) in zip(part.results, pairs, strict=True)]
                pixels = np.stack([image for image, _ in pairs])
                part = dataclasses.replace(part, request=request, pixels=pixels, results=results)
                yield part if scorer is None else part.take(range(first, len(part)))

        return finished

    def run(self, request: GenerationRequest, **how: Any) -> GeneratedImages:
        """All images of a request; arguments and errors as for `prepare`."""
        return GeneratedImages.join(list(self.prepare(request, **how)(0)))

    def ask(
        self, mode: str, options: Mapping[str, Any], *, features: Features | None = None, **fields: Any
    ) -> GeneratedImages:
        """All images of a call; arguments as for `arguments.request`, features and errors as for `prepare`."""
        request, how = make_request(mode, self.size, options, **fields)
        return self.run(request, features=features, **how)

    @with_options
    def __call__(
        self,
        prompts: Any = None,
        *,
        images: Pictures | None = None,
        mask: Pictures | None = None,
        margins: tuple[int, int, int, int] | None = None,
        region: tuple[int, int, int, int] | None = None,
        keep: float | None = None,
        strength: float | None = None,
        style: str | None = None,
        source_style: str | None = None,
        second_prompt: str | None = None,
        frames: int = 8,
        grid: modes.Grid | None = None,
        mode: str = "",
        **options: Unpack[Options],
    ) -> GeneratedImages:
        """Makes images of prompts or pictures; the arguments tell the mode, unless it is named.

        Args:
          prompts: texts, or pictures, which may be Pillow's, uint8 [H, W, C] or files.
          images: pictures to change; without another argument variations of them, or edits under `prompts`.
            `mask` inpaints, `margins` outpaint, `keep` completes, `region` edits that part, `style` transfers to it.
          second_prompt: interpolates to it, in so many `frames`.
          mode: a key of `modes.MODES`.
          **options: these and the other arguments are fields of `GenerationRequest` and of `Sampling`.

        Raises:
          UserError: for arguments that are out of range or do not fit the decoder.
        """
        if is_pictures(prompts):
            prompts, images = None, prompts
        fields: dict[str, Any] = {
            **{"prompts": prompts, "images": images, "mask": mask, "margins": margins, "region": region, "keep": keep},
            **{"strength": strength, "style": style, "source_style": source_style, "second_prompt": second_prompt},
            "grid": grid,
        }
        mode = mode or mode_of({**fields, "classes": options.get("classes")})
        if mode == "interpolate":
            fields["shares"] = modes.shares_of(frames)
        return dataclasses.replace(self.ask(mode, options, **fields), made_by=self.about)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """Which networks these are, for metadata; hashing them takes a second a gigabyte."""
        return {
            "decoder": self.decoder.path,
            "step": self.decoder.step,
            "decoder_hash": self.decoder.fingerprint(),
            "tokenizer": self.tokenizer.path,
            "tokenizer_step": self.tokenizer.step,
            "tokenizer_hash": self.tokenizer.fingerprint,
            "version": imagegpt_jax.__version__,
        }

    def captions(self, request: GenerationRequest, **how: Any) -> list[str]:
        """Captions of a request's pictures: `num_images` of the first, then of the second; beams give the likeliest.

        `how` is `batch_size` and `mesh` of `prepare`.

        Raises:
          UserError: for a decoder without words, fewer beams than captions, or settings that a search has no use for.
        """
        modes.check(request)
        count, beams, settings = request.num_images, request.beams, dict(request.settings)
        if beams and (idle := sorted(settings.keys() - {"weights"})):
            raise UserError(f"beams={beams} searches for the likeliest captions and draws none: leave {idle[0]} out.")
        if beams and count > beams:
            raise UserError(f"{count} captions of a picture need as many beams, and there are {beams}.")
        plain = {"temperature": 0.0 if count == 1 else 1.0, "top_k": 0, "top_p": 1.0, "cfg_scale": 1.0}
        sampling = self.decoder.sampling(**plain | {"tokens_per_step": 1} | settings)
        codes, grid = modes.source_codes(self.tokenizer, self.sources(request))
        layout = layout_of(self.decoder, grid)
        if beams:
            job = caption_job(layout, codes, sampling)
            best = beam.search(self.decoder.placed(), job, sampling, beams=beams, end=layout.space.eot).tokens
            ids_BT = best[:, :count].reshape(-1, best.shape[2])
        else:
            job = caption_job(layout, np.repeat(codes, count, axis=0), sampling)
            ids_BT = batching.run(self.decoder.placed(), job, sampling, request.seed, **how).tokens
        return [self.decoder.setup.text.decode(until_end(layout, ids_T)) for ids_T in ids_BT]

    # ---------------------------------------------------------------------------------------------------------- parts

    def _read(
        self, request: GenerationRequest, sampling: Sampling, features: Features | None
    ) -> tuple[Layout, modes.Known | None, Callable[[np.ndarray], Job]]:
        """The layout of a request's sequences, what stays of its pictures, and the token job of some of its entries."""
        gpt, known, source = self.decoder, None, self.sources(request) if request.images else None
        mode, (prompts, classes) = modes.MODES[request.mode], request.entries
        if mode.known is not None and source is not None:
            known = mode.known(request, self.tokenizer, source)
        layout = layout_of(gpt, request.grid if known is None else known.grid)
        if request.mode == "style_transfer":
            if not any(prompts):
                prompts = self.captions(GenerationRequest(mode="caption", images=request.images))
            prompts = modes.restyled(prompts, request.style, request.source_style)
        negative = list(request.negative) * (len(prompts) if len(request.negative) == 1 else 1)
        if negative and not sampling.guided:
            raise UserError("a negative prompt acts through guidance: give a cfg_scale other than 1.")
        if negative and len(negative) != len(prompts):
            raise UserError(
                f"there are {len(negative)} negative prompts for {len(prompts)}: give one, or one for each."
            )
        labels = [NO_LABEL if label is None else gpt.class_index(label) for label in classes]
        groups = [prompts] + [[request.second_prompt] * len(prompts)] * bool(request.shares)
        ids = [[gpt.encode_text(text) for text in group] for group in groups]
        away = [gpt.encode_text(text) for text in negative]
        read = [features or gpt.read(prompts), *(gpt.read(group) for group in groups[1:])]
        seen = [part for part in read if part is not None]
        seen_away = gpt.read(negative) if negative else None
        second_B = np.asarray(request.shares, np.float32)
        shares_BG = np.stack([1 - second_B, second_B], axis=1) if request.shares else None

        def job(entries: np.ndarray) -> Job:
            def of(values: Sequence[Any]) -> list[Any]:
                return [values[i] for i in entries]

            return image_job(
                layout,
                [(of(group), of(labels)) for group in ids],
                sampling,
                mix=None if shares_BG is None else shares_BG[entries],
                negative=of(away) if away else None,
                given=None if known is None else known.codes[entries],
                features=[(values[entries], mask[entries]) for values, mask in seen] or None,
                negative_features=None if seen_away is None else (seen_away[0][entries], seen_away[1][entries]),
            )

        return layout, known, job

    def _best(
        self, request: GenerationRequest, every: GeneratedImages, layout: Layout, scorer: scorers.Scorer
    ) -> GeneratedImages:
        """The `num_images` of each entry that the scorer finds best, best first."""
        of = request.best_of or 1
        asked = [scorers.Asked(text, label) for text, label in zip(*request.entries, strict=True) for _ in range(of)]
        candidates = scorers.Candidates(asked, every.pixels, every.codes, every.log_likelihood, layout)
        scores = np.asarray(scorer(self.decoder, candidates), np.float32)
        order = np.argsort(-scores.reshape(-1, of), axis=1, kind="stable")[:, : request.num_images]
        chosen = (order + np.arange(len(order))[:, None] * of).reshape(-1)
        results = [{"score": float(scores[i])} for i in range(len(every))]
        best = dataclasses.replace(every, results=results).take(chosen)
        return dataclasses.replace(best, numbers=np.arange(len(chosen)))


def layout_of(gpt: Decoder, grid: modes.Grid | None) -> Layout:
    """The decoder's layout, with another grid of codes. Raises UserError if the decoder does not know its positions."""
    layout = gpt.setup.layout
    if grid is None or tuple(grid) == tuple(layout.grid):
        return layout
    layout = dataclasses.replace(layout, grid=tuple(grid))
    config = gpt.gpt.config
    if config.position == "learned" and layout.max_position >= config.max_length:
        raise UserError(
            f"a grid of {grid[0]} x {grid[1]} codes needs positions up to {layout.max_position}, and the decoder has"
            f" learned {config.max_length}: ask for at most {config.max_length - layout.text_length - 2} a side."
        )
    return layout
