"""Scores of sets of images, wherever they come from: files, a tokenizer's reconstructions, a decoder's samples.

The one way to them: a pass over each set gathers features, and the table of metrics makes scores of what was gathered.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from imagegpt_jax.metrics import feature_statistics, networks, score
from imagegpt_jax.metrics.feature_statistics import VALUES, FeatureStatistics, Output
from imagegpt_jax.metrics.features import Network
from imagegpt_jax.metrics.metric import CAPTIONS, Options, Result
from imagegpt_jax.metrics.protocols import Protocol
from imagegpt_jax.metrics.sets import ImageSet
from imagegpt_jax.metrics.statistics_files import FileStatistics
from imagegpt_jax.runtime import progress

BATCH_SIZE = 64


class SetScorer:
    """Scores sets by one protocol; its networks are loaded once and live as long as it does."""

    def __init__(
        self,
        names: Sequence[str],
        protocol: Protocol,
        weights: Mapping[str, str],
        options: Options = score.NO_OPTIONS,
        *,
        captions: Sequence[str] = (),
        batch_size: int = BATCH_SIZE,
        besides: Sequence[str] = (),
        progress: bool = False,
    ):
        """Loads the networks, of the public files where `weights` has none.

        `captions` are those of the images, for the metrics that need them; `besides` are metrics whose statistics of
        the images are gathered too. No score depends on `batch_size`, the images that a process reads at once.

        Raises:
          UserError: for weights that are missing or do not fit.
        """
        self.names, self.protocol, self.options = names, protocol, options
        self._weights, self._captions, self._batch_size, self._progress = weights, captions, batch_size, progress
        needs = {
            "images": score.needs([*names, *besides], protocol, options, reference=False),
            "reference": score.needs(names, protocol, options, reference=True),
        }
        used = sorted({output[0] for outputs in needs["images"].values() for output in outputs})
        self.networks: list[Network] = [networks.load(n, weights.get(n, ""), protocol.resize) for n in used]
        if paired := score.paired(names):
            self.networks.append(networks.pairs(paired, weights.get("lpips", "")))
            needs["pairs"] = {VALUES: [("pairs", name) for name in paired]}
        self.needs: Mapping[str, Mapping[str, Sequence[Output]]] = needs

    def gather(self, role: str, images: ImageSet, forms: Sequence[str] | None = None) -> FeatureStatistics:
        """Passes over a set once, which a damaged image ends with a UserError.

        Args:
          role: "images", "reference", or "pairs"; of anything else, such as "train images", only what all images are.
          images: the set.
          forms: only these forms of features; None for all that the metrics need.
        """
        needs = self.needs.get(role, {})
        needs = {form: outputs for form, outputs in needs.items() if forms is None or form in forms}
        used = {output[0] for outputs in needs.values() for output in outputs}
        chosen = [network for network in self.networks if network.name in used]
        with progress.bar(desc=role, unit="image", total=len(images), disable=not self._progress) as bar:
            return feature_statistics.collect(
                images, needs, chosen, self.protocol, batch_size=self._batch_size, advance=bar.update
            )

    def scores(
        self,
        images: FeatureStatistics,
        reference: FeatureStatistics | FileStatistics | None,
        judged: tuple[float, dict[str, float]] | None = None,
    ) -> dict[str, Result]:
        """The metrics' values, see `score.compute`."""
        texts_NE = self._texts_NE if any(score.find(name).reference == CAPTIONS for name in self.names) else None
        how = (self.protocol, self.options, self._captions, texts_NE, judged)
        return score.compute(self.names, images, reference, *how)

    @functools.cached_property
    def _texts_NE(self) -> np.ndarray:
        return networks.embed_texts(self._weights["clip"], [self.protocol.prefix + text for text in self._captions])
