"""What scores networks: one kind of object, called while a run trains and for a checkpoint that is scored later."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluator returns.

    Attributes:
      scores: name -> value, such as "validation/psnr", in the order in which they are written.
      images: name -> uint8 [N, H, W, C], shown beside the scores.
      details: name -> array of what the scores were made of, for a report.
    """

    scores: Mapping[str, float]
    images: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    details: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Evaluator(Protocol):
    """Constructed with what it needs besides parameters: data, mesh, feature networks. It lives as long as its run."""

    def evaluate(self, params: Mapping[str, dict[Any, Any]], step: int) -> Evaluation:
        """Scores networks; every process of the mesh calls it.

        Args:
          params: network -> its parameters to evaluate with, averaged ones where the run keeps averages.
          step: optimizer steps done.
        """
        ...
