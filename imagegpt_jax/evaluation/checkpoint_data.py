"""What is asked of the scores of checkpoints, and the checkpoints and data that they are of.

Heavy imports are inside the functions, so that a wrong flag is reported at once.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from imagegpt_jax import config as config_lib
from imagegpt_jax import errors
from imagegpt_jax.data import mixture, pipeline, sources
from imagegpt_jax.runtime import progress

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from imagegpt_jax.data.interface import Source
    from imagegpt_jax.metrics.sets import ImageSet

Scores = dict[str, float | int | str]
BATCH_SIZE = 64
ROWS = 8  # of a device at once, always: products of other shapes differ in the last bits


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is to be scored, and how: the flags of `evaluate` of the same names, whose help says what they mean.

    Attributes:
      checkpoints: workdirs or exported folders, one of each kind.
      step: None for the newest.
      samples_per_prompt: 0 for the default.
      sampler: settings of `Sampling` in place of the decoder's own.
      metrics: of image sets, such as fid, for a tokenizer's reconstructions and a decoder's samples.
      weights: name of a feature network -> file of its weights.
      samples_dir: folder for the pictures of `prompts`, which are at most `num_images`; 0 for all.
    """

    checkpoints: Sequence[str]
    output: str
    data: str = ""
    ops: str = ""
    step: int | None = None
    tokenizer: str = ""
    batch_size: int = 0
    generation_prompts: int = 100
    samples_per_prompt: int = 0
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_data: str = ""
    seed: int = 0
    images_dir: str = ""
    report: str = ""
    protocol: str = "rfid_imagenet_val"
    metrics: Sequence[str] = ()
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prompts: str = ""
    samples_dir: str = ""
    num_images: int = 0


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and the spec that opens it."""

    spec: str
    source: "Source"

    def numbered(self, label_names: Sequence[str]) -> "Data":
        """The same with classes numbered as these names are, if there are any."""
        return Data(self.spec, mixture.renumber(self.source, label_names)) if label_names else self

    @property
    def about(self) -> Scores:
        """Where a score is from."""
        return {"data": self.spec, "data_fingerprint": self.source.fingerprint}


@dataclasses.dataclass
class Page:
    """What a page shows besides scores."""

    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # uint8 [H, W, C] by name
    details: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # see `metrics.reconstruction`
    samples: "tuple[ImageSet, ImageSet] | None" = None  # and what they may be copies of


def batches(settings: Settings, name: str, data: Data, ops: str, mesh: "Mesh", **columns: Any) -> Iterable[Any]:
    """One pass over the data in order, in batches of which every device has whole parts of `ROWS`.

    `name` stands beside the progress bar; `columns` are those of `pipeline.Batches`.
    """
    from imagegpt_jax.parallel import sharding

    whole = ROWS * sharding.batch_shards(mesh)
    size = -(-(settings.batch_size or BATCH_SIZE) // whole) * whole
    one_pass: Any = {"rows": sharding.host_rows(mesh, size), "shuffle": False, "epochs": 1, **columns}
    read = pipeline.Batches(data.source, ops=ops, batch_size=size, **one_pass)
    return progress.bar(read, desc=name, unit="batch", total=-(-len(data.source) // size))


def find_runs(settings: Settings) -> dict[str, str]:
    """Kind -> checkpoint, for those that are named; raises UserError if one is not there, or two are of one kind."""
    runs: dict[str, str] = {}
    for path in settings.checkpoints:
        kind = kind_of(path)
        if kind in runs:
            raise errors.UserError(f"{runs[kind]} and {path} are both a {kind}: score them one at a time.")
        runs[kind] = path
    if settings.step is not None and len(runs) > 1:
        raise errors.UserError("--step needs a single --checkpoint: score them one at a time.")

    from imagegpt_jax import checkpoint  # imports JAX, for whose start a wrong folder should not wait
    from imagegpt_jax.convert import reading

    for path in runs.values():
        if not reading.is_weights(path):
            checkpoint.choose_step(path, settings.step)
        elif settings.step is not None:
            raise errors.UserError(f"{path} holds exported weights, which have no steps: leave --step out.")
    return runs


def kind_of(path: str) -> str:
    """What a path holds: "tokenizer", "decoder", or a task's own kind; raises UserError if it is none of these."""
    config_lib.load(path)  # a wrong folder is told before JAX starts

    from imagegpt_jax.inference import loading

    return loading.kind_of(path)


def config_of(path: str) -> Any:
    """The config of the run that trained a checkpoint, exported or not; raises UserError if no run of ours did."""
    from imagegpt_jax.convert import reading

    config: Any = config_lib.load(path)
    if "data" not in config and reading.is_weights(path):
        raise errors.UserError(
            f"{path} does not say on which data it is scored, since it was not trained here: give a tokenizer's --data"
            " and --ops; pictures of a decoder are drawn and scored by --prompts."
        )
    return config


def open_data(settings: Settings, path: str, require: str | None) -> Data:
    """Opens what a checkpoint is scored on: `settings.data`, else its run's own validation data."""
    spec = settings.data or config_of(path).data.validation
    return Data(spec, sources.open_source(spec, require=require))


def source_of(spec: str) -> str:
    """For token shards, the pictures that they were encoded from; else the data set itself."""
    source = sources.open_source(spec)
    if "codes" not in source.__getitems__([0])[0]:
        return spec
    made_of = getattr(source, "info", {}).get("source", "")
    if not made_of:
        raise errors.UserError(f"{source.name} does not say which pictures it was made of: give --generation_data.")
    _, subset, side = spec.partition(",subset=")
    if subset and ",subset=" not in made_of:
        if not getattr(sources.open_source(made_of), "names", None):
            raise errors.UserError(f"{made_of} is not split by name, as {spec} is: give --generation_data.")
        made_of += subset + side
    return made_of
