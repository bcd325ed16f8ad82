"""Scorers: which of several pictures of one request is the best. A scorer is any function with these two arguments:

    def score(gpt: Decoder, candidates: Candidates) -> one number for each candidate, larger is better

Known by name:
    likelihood   log P(picture | words) under the guided logits that it was sampled with
    caption      log P(words | picture) of the same decoder, run image -> text: needs `config.data.image_to_text`
    words        log P(picture | words) - log P(picture): how much the words explain
    clip:FOLDER  CLIPScore (arXiv:2104.08718) of the prompts, with the weights and tokenizer in that folder
Any other is given as "module:function", or as the function itself.

Shapes: B candidates, H W C image, N codes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from imagegpt_jax.data.packing import NO_LABEL, Layout
from imagegpt_jax.errors import UserError
from imagegpt_jax.plugins import resolve
from imagegpt_jax.sampling.likelihood import log_likelihood

if TYPE_CHECKING:
    from imagegpt_jax.inference.loading import Decoder


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a candidate should show."""

    prompt: str
    label: int | str | None


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Pictures to score.

    Attributes:
      asked: what each should show.
      images: uint8 [B, H, W, C].
      codes: int32 [B, N].
      log_likelihood: float32 [B], see `engine.State`.
      layout: of their codes.
    """

    asked: Sequence[Asked]
    images: np.ndarray
    codes: np.ndarray
    log_likelihood: np.ndarray
    layout: Layout


Scorer = Callable[["Decoder", Candidates], np.ndarray]


def likelihood(gpt: "Decoder", candidates: Candidates) -> np.ndarray:
    """log P(picture | words), as it was sampled."""
    return candidates.log_likelihood


def caption(gpt: "Decoder", candidates: Candidates) -> np.ndarray:
    """log P(words | picture): the decoder reads the picture and says how likely the words are."""
    if not gpt.setup.layout.space.text_vocab:
        raise UserError("the scorer 'caption' needs a decoder with words: use --scorer=likelihood.")
    texts, labels = _ids(gpt, candidates)
    return log_likelihood(gpt.gpt, candidates.layout, texts, labels, candidates.codes, of="text")


def words(gpt: "Decoder", candidates: Candidates) -> np.ndarray:
    """log P(picture | words) - log P(picture), both without guidance: the pointwise mutual information."""
    texts, labels = _ids(gpt, candidates)
    prompts = [asked.prompt for asked in candidates.asked]
    seen, nothing = (gpt.read(words) for words in (prompts, [""] * len(prompts)))
    given = log_likelihood(gpt.gpt, candidates.layout, texts, labels, candidates.codes, features=seen)
    none = log_likelihood(gpt.gpt, candidates.layout, [[] for _ in texts], None, candidates.codes, features=nothing)
    return given - none


def clip_score(folder: str, gpt: "Decoder", candidates: Candidates) -> np.ndarray:
    """100 times the cosine of CLIP's embeddings of picture and prompt, at least 0; classes are not regarded.

    `folder` has CLIP's weights and tokenizer, as `transformers` saves them.
    """
    from imagegpt_jax.metrics import captions, networks

    network = networks.load("clip", folder, "")
    apply, rows = jax.jit(network.apply), []
    for image in candidates.images:  # one size of batch, so that a score does not depend on the others
        image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
        rows.append(np.asarray(apply(network.params, network.prepare(image)[None])["embedding"])[0])
    texts = networks.embed_texts(folder, [asked.prompt for asked in candidates.asked])
    return captions.clip_scores(np.stack(rows), texts)


def _ids(gpt: "Decoder", candidates: Candidates) -> tuple[list[list[int]], list[int]]:
    texts = [gpt.encode_text(asked.prompt) for asked in candidates.asked]
    return texts, [NO_LABEL if a.label is None else gpt.class_index(a.label) for a in candidates.asked]


SCORERS: dict[str, Scorer] = {"likelihood": likelihood, "caption": caption, "words": words}


def find(name: str | Scorer) -> Scorer:
    """A scorer by its name, "clip:FOLDER", "module:function", or as it is. Raises UserError if there is none."""
    if callable(name):
        return name
    if name.startswith("clip:"):
        return functools.partial(clip_score, name.removeprefix("clip:"))
    return resolve(name, "scorer", SCORERS)
