"""What checkpoints are scored on, and how their scores are shown.

Heavy imports are inside the functions, so that a wrong flag is told at once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from imagegpt_jax import errors

if TYPE_CHECKING:
    from imagegpt_jax.data.sources import Source

Scores = dict[str, float | int | str]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is to be scored, and how.

    Attributes:
      checkpoints: workdirs or exported folders of a tokenizer, a decoder, or both.
      output: JSON file to write.
      data: data to score on; "" for the run's own validation data.
      ops: what is done to its images; "" for the run's own.
      step: checkpoint step, with one checkpoint; None for the newest.
      tokenizer: workdir of the image tokenizer; "" for the one that the decoder was trained with.
      batch_size: examples that are read at once; 0 for the default. No score depends on it.
      generation_prompts: prompts to draw pictures for; 0 leaves that score out.
      samples_per_prompt: pictures of each prompt.
      sampler: settings of `Sampling` in place of the decoder's own.
      generation_data: pictures and captions to draw prompts from; "" for the decoder's training data.
      seed: of the choice of prompts and of their pictures.
      images_dir: folder for pictures of reconstructions and generations; "" for none.
      report: HTML file to write; "" for none.
      protocol: how reconstructions are scored as image sets.
      metrics: of image sets, such as fid, for a tokenizer's reconstructions and a decoder's samples.
      weights: name of a feature network -> file of its weights.
    """

    checkpoints: Sequence[str]
    output: str
    data: str = ""
    ops: str = ""
    step: int | None = None
    tokenizer: str = ""
    batch_size: int = 0
    generation_prompts: int = 100
    samples_per_prompt: int = 4
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_data: str = ""
    seed: int = 0
    images_dir: str = ""
    report: str = ""
    protocol: str = "rfid_imagenet_val"
    metrics: Sequence[str] = ()
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the printed table: a score and its control, by their keys."""

    name: str
    key: str
    control: str = ""
    control_key: str = ""


TABLE = (
    Line("reconstruction PSNR, dB", "tokenizer/val_psnr", "mean colour", "tokenizer/val_psnr_mean_color"),
    Line("rFID", "reconstruction/fid"),
    Line("KID of reconstructions", "reconstruction/kid"),
    Line("codebook usage", "tokenizer/codebook_usage"),
    Line("codebook perplexity", "tokenizer/codebook_perplexity"),
    Line("image bits per token", "decoder/val_image_bits_per_token", "unigram", "decoder/unigram_image_bits_per_token"),
    Line("text bits per token", "decoder/val_text_bits_per_token", "unigram", "decoder/unigram_text_bits_per_token"),
    Line("KID of samples", "samples/kid", "real pictures", "samples/kid_real"),
    Line("top-1 retrieval", "generation/retrieval_top1", "prompts shuffled", "generation/retrieval_top1_shuffled"),
)


def table(scores: Scores) -> str:
    """The scores that are there, each with its control beside it."""
    lines = []
    for line in TABLE:
        if line.key in scores:
            text = f"{line.name:<26}{scores[line.key]:>10.4f}"
            lines.append(text + (f"   {line.control:>16}{scores[line.control_key]:>10.4f}" if line.control else ""))
    return "\n".join(lines)


def rows(scores: Scores) -> list[tuple[str, str, str, str]]:
    """As `table`, for a page: name, score, name of the control, control; and the metrics of sets that are not in it."""
    found, lines = [], list(TABLE)
    for key, value in scores.items():
        of_sets = key.startswith(("reconstruction/", "samples/")) and isinstance(value, float)
        if of_sets and not key.endswith(("_low", "_high", "_real")) and key not in {line.key for line in TABLE}:
            control = f"{key}_real" if f"{key}_real" in scores else ""
            lines.append(Line(key, key, "real pictures" if control else "", control))
    for line in lines:
        if line.key in scores:
            control = f"{scores[line.control_key]:.6g}" if line.control else ""
            found.append((line.name, f"{scores[line.key]:.6g}", line.control, control))
    return found


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and the spec that opens it."""

    spec: str
    source: "Source"

    @property
    def about(self) -> Scores:
        """Where a score is from."""
        return {"data": self.spec, "data_fingerprint": self.source.fingerprint}


class Subset:
    """Some records of a source, in a given order."""

    def __init__(self, source: "Source", indices: Sequence[int]):
        self._source, self._indices = source, list(indices)
        self.name, self.label_names, self.fingerprint = source.name, source.label_names, source.fingerprint
        self.quarantine = None

    def __len__(self) -> int:
        return len(self._indices)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Records of the source."""
        return self._source.__getitems__([self._indices[i] for i in indices])


def stages(settings: Settings) -> dict[str, str]:
    """Task -> checkpoint, for those that are named, each of which has been found to be there."""
    found: dict[str, str] = {}
    for path in settings.checkpoints:
        task = task_of(path)
        if task in found:
            raise errors.UserError(f"{found[task]} and {path} are both a {task}: score them one at a time.")
        found[task] = path
    if settings.step is not None and len(found) > 1:
        raise errors.UserError("--step needs a single --checkpoint: score them one at a time.")

    from imagegpt_jax import checkpoint  # imports JAX, for whose start a wrong folder should not wait
    from imagegpt_jax.convert import reading

    for path in found.values():
        if not reading.is_weights(path):
            checkpoint.choose_step(path, settings.step)
        elif settings.step is not None:
            raise errors.UserError(f"{path} holds exported weights, which have no steps: leave --step out.")
    return found


def task_of(path: str) -> str:
    """ "tokenizer" or "decoder", whichever a workdir, an exported folder or published weights hold.

    Raises:
      UserError: if it is none of these.
    """
    from imagegpt_jax import config as config_lib

    task: Any = config_lib.load(path).task
    if task != "weights":
        return task

    from imagegpt_jax.convert import formats, reading

    problems: list[str] = []
    for kind in (formats.TOKENIZER, formats.DECODER):
        try:
            reading.describe(path, kind)
        except errors.UserError as e:
            problems.append(str(e))
        else:
            return kind
    raise errors.UserError(problems[0])


def config_of(path: str) -> Any:
    """The config of the run that trained a checkpoint, also where it was exported.

    Raises:
      UserError: if these are weights of others, which no run of ours trained.
    """
    from imagegpt_jax import config as config_lib

    config: Any = config_lib.load(path)
    if config.task == "weights":
        raise errors.UserError(
            f"{path} does not say on which data it is scored, since it was not trained here: give a tokenizer's --data"
            " and --ops; pictures of a decoder are drawn and scored by --prompts."
        )
    return config


def by_class(config: Any) -> bool:
    """Whether a decoder draws classes, not words."""
    return config.data.text_length <= int(config.data.use_labels)


def open_data(settings: Settings, found: Mapping[str, str]) -> dict[str, Data]:
    """Opens what each stage, and "generation", is scored on."""
    from imagegpt_jax.data import sources

    opened = {}
    for task, path in found.items():
        spec = settings.data or config_of(path).data.validation
        opened[task] = Data(spec, sources.open_source(spec, require="image" if task == "tokenizer" else None))
    if "decoder" in found and settings.generation_prompts:
        config = config_of(found["decoder"])
        spec = source_of(settings.generation_data or config.data.train)
        opened["generation"] = Data(spec, sources.open_source(spec, require="image"))
        sources.open_source(spec, require="label" if by_class(config) else "captions")
    return opened


def source_of(spec: str) -> str:
    """For token shards, the pictures that they were encoded from; else the data set itself."""
    from imagegpt_jax.data import sources

    source = sources.open_source(spec)
    if "codes" not in source.__getitems__([0])[0]:
        return spec
    made_of = getattr(source, "info", {}).get("source", "")
    if not made_of:
        raise errors.UserError(f"{source.name} does not say which pictures it was made of: give --generation_data.")
    return made_of
