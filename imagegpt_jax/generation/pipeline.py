"""What one decoder can draw: from words, from a class, from a picture, from a part of one, and words from pictures.

Every task comes down to a `Sketch`: prompts, which codes are given, and what of the source's pixels stays. `draw` makes
pictures of a sketch, a tile at a time. `generation/request.py` makes the sketches of tasks, for the notebook calls in
`generation/functional.py` and for the sampling binary alike.

Shapes: B pictures, H W C image, r c code grid, N = r * c codes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from imagegpt_jax import images as images_lib
from imagegpt_jax.data.packing import NO_LABEL, Layout
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import scorers
from imagegpt_jax.inference.loading import Decoder, Tokenizer
from imagegpt_jax.sampling.batching import BATCH_SIZE, run
from imagegpt_jax.sampling.jobs import image_job
from imagegpt_jax.sampling.settings import Sampling

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sketch:
    """What is to be drawn; every field has one entry for each of B requests.

    Attributes:
      prompts: texts; "" for none.
      classes: names or numbers; None for none.
      negative: what guidance leads away from; None for nothing in particular.
      second: texts that are mixed in; None for none.
      shares: float [B], how much of the logits is `second`'s.
      given: int32 [B, N], codes that are taken over, UNKNOWN elsewhere; None where all are drawn.
      grid: (rows, columns) of codes; None for the decoder's own.
      source: uint8 [B, H, W, C], the picture whose pixels stay where `fresh` is not set.
      fresh: bool [B, H, W], where new pixels go.
      features: float [B, P, E], a text encoder's output, for a decoder with `feature_width`.
      feature_mask: bool [B, P], which of them are real.
    """

    prompts: Sequence[str]
    classes: Sequence[int | str | None]
    negative: Sequence[str] | None = None
    second: Sequence[str] | None = None
    shares: np.ndarray | None = None
    given: np.ndarray | None = None
    grid: Grid | None = None
    source: np.ndarray | None = None
    fresh: np.ndarray | None = None
    features: np.ndarray | None = None
    feature_mask: np.ndarray | None = None

    def take(self, entries: Sequence[int]) -> "Sketch":
        """The sketch of some of the requests."""

        def pick(value: Any) -> Any:
            return value[list(entries)] if isinstance(value, np.ndarray) else [value[i] for i in entries]

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "grid"}
        return dataclasses.replace(self, **{k: None if v is None else pick(v) for k, v in fields.items()})


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Some pictures, in order.

    Attributes:
      images: uint8 [b, H, W, C].
      codes: int32 [b, N].
      log_likelihood: float32 [b], of the codes, in nats, under the guided logits.
    """

    images: np.ndarray
    codes: np.ndarray
    log_likelihood: np.ndarray


def layout_of(gpt: Decoder, grid: Grid | None) -> Layout:
    """The decoder's layout, with another grid of codes.

    Raises:
      UserError: for a grid whose positions the decoder does not know.
    """
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


def check_pair(gpt: Decoder, tok: Tokenizer) -> None:
    """Raises UserError unless these are a decoder and the kind of tokenizer that it was trained with."""
    if not isinstance(gpt, Decoder) or not isinstance(tok, Tokenizer):
        raise UserError("give a decoder from load_decoder and a tokenizer from load_tokenizer, in this order.")
    if gpt.setup.layout is None:
        raise UserError(f"{gpt.path} is a language model: it draws no pictures.")
    codes = gpt.setup.layout.space.num_codes
    if tok.num_codes != codes:
        raise UserError(
            f"the tokenizer has {tok.num_codes} codes and the decoder was trained with {codes}: give the tokenizer that"
            " the decoder was trained with."
        )


def draw(
    gpt: Decoder,
    tok: Tokenizer,
    sketch: Sketch,
    sampling: Sampling,
    seed: int = 0,
    *,
    num_images: int = 1,
    first: int = 0,
    draws: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    mesh: jax.sharding.Mesh | None = None,
    on_step: Callable[[int, np.ndarray], None] | None = None,
) -> Iterator[Drawing]:
    """Draws a sketch a tile at a time: `num_images` of the first request, then of the second, and so on.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      sketch: what to draw.
      sampling: how to draw.
      seed: the draws of picture i depend on (seed, i) alone.
      num_images: pictures of each request.
      first: number of the picture to begin with; those before it have been drawn.
      draws: for each picture, the number i of its draws in place of its own number.
      batch_size: pictures that a device draws at once.
      mesh: devices to draw on, see `sampling.batching.run`.
      on_step: called after every code, see `sampling.batching.run`.

    Returns:
      an iterator; all arguments have been checked when it is returned.

    Raises:
      UserError: for a request or a tokenizer that does not fit the decoder.
    """
    check_pair(gpt, tok)
    if not sketch.prompts or num_images < 1 or seed < 0:
        raise UserError("generating needs at least one prompt or class, num_images >= 1 and seed >= 0.")
    layout = layout_of(gpt, sketch.grid)
    texts = [gpt.encode_text(text) for text in sketch.prompts]
    second = None if sketch.second is None else [gpt.encode_text(text) for text in sketch.second]
    negative = None if sketch.negative is None else [gpt.encode_text(text) for text in sketch.negative]
    labels = [NO_LABEL if label is None else gpt.class_index(label) for label in sketch.classes]
    seen = None if sketch.features is None else (sketch.features, sketch.feature_mask)
    features = [seen or gpt.read(sketch.prompts), None if sketch.second is None else gpt.read(sketch.second)]
    away = None if sketch.negative is None else gpt.read(sketch.negative)
    if negative is not None and not sampling.guided:
        raise UserError("a negative prompt acts through guidance: give a cfg_scale other than 1.")
    together = batch_size * (1 if mesh is None else mesh.size // mesh.shape["tensor"])
    total = len(texts) * num_images

    def tiles() -> Iterator[Drawing]:
        for start in range(first, total, together):
            index = np.arange(start, min(start + together, total))
            request = index // num_images
            prompts = [([texts[i] for i in request], [labels[i] for i in request])]
            mix = None
            if second is not None:
                shares_b = np.asarray(sketch.shares)[request]
                prompts.append(([second[i] for i in request], prompts[0][1]))
                mix = np.stack([1 - shares_b, shares_b], axis=1)
            job = image_job(
                layout,
                prompts,
                sampling,
                mix=mix,
                negative=None if negative is None else [negative[i] for i in request],
                given=None if sketch.given is None else sketch.given[request],
                features=[_rows(f, request) for f in features if f is not None] or None,
                negative_features=None if away is None else _rows(away, request),
            )
            drawn = run(
                gpt.placed(sampling.weights, mesh),
                job,
                sampling,
                seed,
                sample_indices=index if draws is None else np.asarray(draws)[index],
                batch_size=batch_size,
                mesh=mesh,
                on_step=on_step,
            )
            pictures = images_lib.to_uint8(tok.decode(drawn.tokens, layout.grid))
            if sketch.source is not None and sketch.fresh is not None:
                pictures = np.where(sketch.fresh[request][..., None], pictures, sketch.source[request])
            yield Drawing(pictures, drawn.tokens, drawn.log_likelihood)

    return tiles()


def _rows(arrays: Any, rows: np.ndarray) -> Any:
    """Rows of each array."""
    return tuple(array[rows] for array in arrays)


def best(
    gpt: Decoder,
    tok: Tokenizer,
    sketch: Sketch,
    sampling: Sampling,
    seed: int,
    *,
    best_of: int,
    num_images: int = 1,
    scorer: str | scorers.Scorer = "likelihood",
    **how: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws `best_of` pictures of each request and keeps the `num_images` that a scorer finds best, best first.

    Args:
      gpt: the decoder.
      tok: its image tokenizer.
      sketch: what to draw.
      sampling: how to draw.
      seed: picture i of request r has the draws of (seed, r * best_of + i).
      best_of: pictures to draw of each request.
      num_images: pictures to keep.
      scorer: a name, or "module:function", see `sampling.scorers`.
      **how: `tile` and `mesh` of `draw`.

    Returns:
      (uint8 [B * num_images, H, W, C], their scores float32, the number of each one's draws)
    """
    if best_of < num_images:
        raise UserError(f"best_of={best_of} must be at least num_images={num_images}: of so many the best are kept.")
    score = scorers.find(scorer)
    parts = list(draw(gpt, tok, sketch, sampling, seed, num_images=best_of, **how))
    pictures, codes, likelihoods = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "codes", "log_likelihood")
    )
    asked = [scorers.Asked(t, c) for t, c in zip(sketch.prompts, sketch.classes, strict=True) for _ in range(best_of)]
    layout = layout_of(gpt, sketch.grid)
    scores = np.asarray(score(gpt, scorers.Candidates(asked, pictures, codes, likelihoods, layout)), np.float32)
    order = np.argsort(-scores.reshape(-1, best_of), axis=1, kind="stable")[:, :num_images]
    chosen = (order + np.arange(len(order))[:, None] * best_of).reshape(-1)
    return pictures[chosen], scores[chosen], chosen
