"""A decoder's samples scored as a set while it trains: the same metrics, by the same code, as of folders of images.

Shapes: N samples, H W C image.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.metrics import networks, protocols, score
from imagegpt_jax.metrics.feature_statistics import collect
from imagegpt_jax.metrics.reconstructed import Held
from imagegpt_jax.metrics.sets import ImageSet

# Network -> protocol, and the metrics that are told at every evaluation.
KNOWN: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "efficientnet_lite0": ("emoji", ("kid",)),
    "inception": ("torch_fidelity", ("fid", "kid")),
    "clip": ("parti_prompts", ("clip_score",)),
}
_BATCH_SIZE = 64


def parse(features: str) -> dict[str, str]:
    """`"efficientnet_lite0,clip=FOLDER"` -> {network: weights}, "" for those that need no file.

    Raises:
      UserError: for an unknown network, or one without the weights that it needs.
    """
    found: dict[str, str] = {}
    for item in filter(None, features.split(",")):
        name, _, path = item.partition("=")
        if name not in KNOWN:
            raise UserError(f"config.eval_features names {name!r}.{suggest(name, KNOWN)}")
        if not path and name == "clip":
            raise UserError("config.eval_features=clip needs weights: clip=FOLDER of openai/clip-vit-base-patch32.")
        found[name] = path
    return found


def check(config: Any) -> None:
    """Checks a decoder's `eval_samples` and `eval_features` before it trains; fetches public weights.

    Raises:
      UserError: for what cannot work.
    """
    if config.eval_samples < 2:
        raise UserError(f"config.eval_samples={config.eval_samples} is no set of pictures: give 2 or more, or 0.")
    found = parse(config.eval_features)
    if not found:
        raise UserError(
            f"config.eval_samples={config.eval_samples} and config.eval_features is empty: name what scores the"
            " pictures, such as --config.eval_features=efficientnet_lite0."
        )
    for name, path in found.items():
        networks.check_weights(name, path, "--config.eval_features=NAME=FILE")


class Scorer:
    """Scores pictures of the same prompts again and again, against the same reference."""

    def __init__(self, features: str, reference: ImageSet, captions: Sequence[str]):
        """Loads the networks and passes over the reference once.

        Args:
          features: see `parse`.
          reference: what the pictures are compared with.
          captions: what each picture was asked to show.

        Raises:
          UserError: as `parse`, and for weights that are not there or do not fit.
        """
        self._parts = []
        for name, path in parse(features).items():
            protocol, metrics = KNOWN[name]
            found = dataclasses.replace(protocols.find(protocol), features=name)
            network = networks.load(name, path, found.resize)
            words = None
            if name == "clip":
                words = score.Words(captions, networks.embed_texts(path, captions))
            needs = score.needs(metrics, found, score.Options(), reference=True)
            beside = collect(reference, needs, [network], found, batch_size=_BATCH_SIZE) if needs else None
            against = None if beside is None else score.Reference(beside, name)
            self._parts.append((metrics, found, network, against, words))

    def __call__(self, samples_NHWC: UInt8[np.ndarray, "N H W 3"]) -> dict[str, float]:
        """`samples_fid`, `samples_kid`, `samples_clip_score`, those whose networks there are."""
        images = Held("samples", samples_NHWC)
        values: dict[str, Any] = {}
        for metrics, protocol, network, against, words in self._parts:
            needs = score.needs(metrics, protocol, score.Options(), reference=False)
            found = collect(images, needs, [network], protocol, batch_size=_BATCH_SIZE)
            scores = score.compute(metrics, found, against, protocol, score.Options(), words)
            values |= {f"samples_{name}": result["value"] for name, result in scores.items() if name not in values}
            found.close()
        return values
