"""Scores of samples: as a set against held-out images, and by whether each shows what its prompt asks for.

Shapes: N samples, P prompts, H W C image.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.metrics import networks, protocols, retrieval
from imagegpt_jax.metrics.evaluator import Evaluation
from imagegpt_jax.metrics.feature_statistics import FeatureStatistics
from imagegpt_jax.metrics.set_scorer import SetScorer
from imagegpt_jax.metrics.sets import ImageSet, InMemory

# Network of `config.eval_features` -> protocol, and the metrics that are computed at every evaluation.
IN_TRAINING: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "efficientnet_lite0": ("emoji", ("kid",)),
    "inception": ("torch_fidelity", ("fid", "kid")),
    "clip": ("parti_prompts", ("clip_score",)),
}


def parse_features(features: str) -> dict[str, str]:
    """`"efficientnet_lite0,clip=FOLDER"` -> {network: weights, or ""}; raises UserError for unknown or missing ones."""
    weights: dict[str, str] = {}
    for item in filter(None, features.split(",")):
        name, _, path = item.partition("=")
        if name not in IN_TRAINING:
            raise UserError(f"config.eval_features names {name!r}.{suggest(name, IN_TRAINING)}")
        if not path and name == "clip":
            raise UserError("config.eval_features=clip needs weights: clip=FOLDER of openai/clip-vit-base-patch32.")
        weights[name] = path
    return weights


def check_config(config: Any) -> None:
    """Checks `eval_samples` and `eval_features`, and fetches public weights; raises UserError for what cannot work."""
    if config.eval_samples < 2:
        raise UserError(f"config.eval_samples={config.eval_samples} is no set of pictures: give 2 or more, or 0.")
    weights = parse_features(config.eval_features)
    if not weights:
        raise UserError(
            f"config.eval_samples={config.eval_samples} and config.eval_features is empty: name what scores the"
            " pictures, such as --config.eval_features=efficientnet_lite0."
        )
    for name, path in weights.items():
        networks.check_weights(name, path, "--config.eval_features=NAME=FILE")


class GenerationEvaluator:
    """Scores samples of the same prompts, drawn again at every evaluation."""

    def __init__(
        self,
        draw: Callable[[Mapping[str, Any]], UInt8[np.ndarray, "N H W C"]],
        *,
        features: str = "",
        captions: Sequence[str] = (),
        held_out: Callable[[], ImageSet] | None = None,
        prompted_PHWC: UInt8[np.ndarray, "P H W C"] | None = None,
        seed: int = 0,
        prefix: str = "",
    ):
        """Draws nothing yet.

        Args:
          draw: params of each network -> samples, as many of each prompt, prompt after prompt.
          features: networks that compare the samples with `held_out` as sets, see `parse_features`.
          captions: what each sample is to show.
          held_out: opens the images that samples are compared with; their features are computed once.
          prompted_PHWC: a picture of each prompt, among which the sample's own is to be the nearest; None leaves
            retrieval out.
          seed: of the control of retrieval.
          prefix: of the names of scores.

        Raises:
          UserError: for features that are not known.
        """
        self._draw, self._features, self._captions, self._held_out = draw, parse_features(features), captions, held_out
        self._prompted, self._seed, self._prefix = prompted_PHWC, seed, prefix

    @functools.cached_property
    def _scorers(self) -> list[tuple[SetScorer, FeatureStatistics | None]]:
        """What scores the samples by each network, with the reference; made at the first evaluation."""
        held_out = None if self._held_out is None else self._held_out()
        scorers = []
        for name, path in self._features.items():
            protocol, metrics = IN_TRAINING[name]
            how = dataclasses.replace(protocols.find(protocol), features=name)
            scorer = SetScorer(metrics, how, {name: path}, captions=self._captions)
            reference = None
            if held_out is not None and scorer.needs["reference"]:
                reference = scorer.gather("reference", held_out)
            scorers.append((scorer, reference))
        return scorers

    def evaluate(self, params: Mapping[str, Any], step: int) -> Evaluation:
        """Draws and scores.

        Returns:
          `samples_fid`, `samples_kid`, `samples_clip_score`, those whose networks there are; where there are pictures
          of the prompts, what `retrieval.retrieval` gives. Details: `samples`, [N, H, W, C].
        """
        del step
        samples_NHWC = self._draw(params)
        scores: dict[str, float] = {}
        if self._prompted is not None:
            each = samples_NHWC.reshape(len(self._prompted), -1, *samples_NHWC.shape[1:])
            scores |= retrieval.retrieval(each, self._prompted, self._seed)
        images = InMemory("samples", samples_NHWC)
        for scorer, reference in self._scorers:
            gathered = scorer.gather("images", images)
            for name, result in scorer.scores(gathered, reference).items():
                scores[f"samples_{name}"] = result["value"]  # of two networks the later one counts
            gathered.close()
        named = {f"{self._prefix}{name}": value for name, value in scores.items()}
        return Evaluation(named, details={"samples": samples_NHWC})
