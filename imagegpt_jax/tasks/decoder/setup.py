"""The static part of the decoder's task: config, token space, networks, text tokenizer and data, checked."""

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imagegpt_jax import checkpoint, train_state
from imagegpt_jax import config as config_lib
from imagegpt_jax.config import Config, to_dataclass
from imagegpt_jax.convert import reading
from imagegpt_jax.data import holdout, mixture, packing, sources
from imagegpt_jax.data import ops as ops_lib
from imagegpt_jax.data import text as text_lib
from imagegpt_jax.errors import SHARE, UserError, at_least, check_ranges
from imagegpt_jax.models import gpt
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.parallel import sharding
from imagegpt_jax.sampling import settings
from imagegpt_jax.tasks import input as splits
from imagegpt_jax.tasks import interface
from imagegpt_jax.tasks import tokenizer as tokenizer_task
from imagegpt_jax.tasks.decoder import from_data, text_encoder
from imagegpt_jax.train_state import Network
from imagegpt_jax.training import config_checks
from imagegpt_jax.training import optimizers as optim

# Of `config.tokenizer`: an image tokenizer of random parameters.
UNTRAINED = "untrained"
RANGES = {
    "data.order.random_until": at_least(0, "0 never draws an order"),
    "data.vocab_multiple": at_least(1, "1 adds no rows"),
    "logit_chunk": at_least(1),
    "ema_decay": optim.EMA_DECAY,
}
TRAINING_RANGES = {"data.guidance_dropout": SHARE, "data.image_to_text": SHARE}


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The static part of the task.

    Attributes:
      config: the run's config.
      model: shape of the decoder.
      layout: token space and sequence layout.
      text: text tokenizer; None where the setup is abstract.
      labels: class names, may be empty.
      networks: "decoder", and "tokenizer" and "encoder" where images and words are encoded within the step.
      optimizers: of "decoder".
      tokenizer: the image tokenizer's static part.
      encoder: the frozen language model whose states are features of the words; None without one.
      sources: split -> opened source; empty for inference.
      notes: (what, in words) of the text and classes that a training begins with.
    """

    config: Config
    model: GPTConfig
    layout: packing.Layout
    text: Any
    labels: tuple[str, ...]
    networks: dict[str, Network]
    optimizers: dict[str, optax.GradientTransformation]
    tokenizer: tokenizer_task.Setup
    encoder: text_encoder.TextEncoder | None
    sources: dict[str, Any]
    notes: from_data.Notes = ()

    @property
    def space(self) -> packing.TokenSpace:
        """The one vocabulary."""
        return self.layout.space

    @functools.cached_property
    def untrained_tokenizer(self) -> train_state.Params:
        """Parameters of the untrained image tokenizer, drawn once: compiling that takes seconds.

        Host arrays, since a training step donates what it is given.
        """
        draw = jax.jit(lambda key: tokenizer_task.init_state(self.tokenizer, key).params("generator"))
        return jax.device_get(draw(jax.random.key(self.tokenizer.config.seed)))


def trained_tokenizer(config: Config) -> str:
    """Where the trained image tokenizer lies that a decoder's config names; "" where it names none."""
    return "" if config.tokenizer == UNTRAINED else config.tokenizer


def tokenizer_config(config: Config) -> Config:
    """Config of the image tokenizer that a decoder's config names, else of an untrained one of `config.seed`."""
    if trained_tokenizer(config):
        try:
            trained = config_lib.load(config.tokenizer)
            kind = interface.find(trained.task).kind
        except UserError as e:
            raise UserError(f"config.tokenizer={config.tokenizer} is no tokenizer: {e}") from e
        if kind != tokenizer_task.TASK.kind:
            raise UserError(f"config.tokenizer={config.tokenizer} holds a {kind}: give a tokenizer's workdir.")
        return trained
    untrained = ConfigDict(config.untrained_tokenizer.to_dict())
    untrained.seed = config.seed
    return untrained


def _image_tokenizer(config: Config) -> tokenizer_task.Setup:
    """Static part of the image tokenizer: of a run, of published or portable weights, or untrained."""
    if reading.is_weights(trained_tokenizer(config)):
        return tokenizer_task.setup_for_weights(*reading.describe(config.tokenizer, "tokenizer"))
    trained = tokenizer_config(config)
    return interface.find(trained.task).setup_for_inference(trained, config.tokenizer)


def _build(
    config: Config,
    text: text_lib.TextTokenizer | None,
    labels: tuple[str, ...],
    opened: dict[str, Any],
    encode: bool,
    num_classes: int,
    train: bool = True,
) -> Setup:
    data = config.data
    image_tokenizer = _image_tokenizer(config)
    encoder, sizes = _text_encoder(config)
    space = packing.TokenSpace(
        text_vocab=text.vocab_size if text is not None else 0 if words_are_features(config) else data.text_vocab_size,
        num_classes=num_classes if data.use_labels else 0,
        num_codes=image_tokenizer.model.quantizer.num_ids,
    )
    layout = packing.Layout(
        space=space,
        text_length=int(data.use_labels) if words_are_features(config) else data.text_length,
        grid=tuple(data.grid),
        text_weight=data.text_weight,
        image_weight=data.image_weight,
        target_positions=config.model.target_positions,
    )
    check_ranges(config, RANGES, "--config.")
    if data.order.random_until > data.order.raster_from or (data.order.raster_from and not layout.target_positions):
        raise UserError(
            f"data.order is random until step {data.order.random_until} and raster from {data.order.raster_from}: the"
            " second must not be before the first, and random orders need model.target_positions=True."
        )
    rows = math.ceil(space.vocab_size / data.vocab_multiple) * data.vocab_multiple
    model = to_dataclass(GPTConfig, {**config.model.to_dict(), **sizes, "vocab_size": rows})
    networks = {"decoder": train_state.network(lambda key: gpt.GPT(model, key=key))}
    trained = config_checks.trained_axes("decoder", networks["decoder"].axes, config.frozen)
    optimizers = {"decoder": optim.make(config.optim, config.steps, trained)}
    if encode:
        networks["tokenizer"] = image_tokenizer.networks["generator"]
    if encoder is not None and train:
        networks["encoder"] = encoder.network
    return Setup(config, model, layout, text, labels, networks, optimizers, image_tokenizer, encoder, opened)


def words_are_features(config: Config) -> bool:
    """Whether a text encoder reads the words, which then are no tokens of the sequence."""
    return bool(config.text_encoder or config.model.feature_width)


def _text_encoder(config: Config) -> tuple[text_encoder.TextEncoder | None, dict[str, int]]:
    """The text encoder that a config names, and the decoder's `feature_width` and `feature_length`."""
    if not words_are_features(config):
        return None, {}
    data, model = config.data, config.model
    length = model.feature_length or data.text_length - int(data.use_labels)
    if length < 1:
        raise UserError("a text encoder needs places for its features: set --config.data.text_length=64, for example.")
    if not config.text_encoder:
        return None, {"feature_length": length}
    encoder = text_encoder.open_encoder(config.text_encoder, length, model.feature_width, model.dtype)
    return encoder, {"feature_length": length, "feature_width": encoder.model.width}


def setup(config: Config, workdir: epath.PathLike | None = None) -> Setup:
    """Reads the config, opens the data, and takes from them what the config leaves to them.

    Args:
      config: of the run; None in it is taken from the data.
      workdir: of a run that goes on, whose text tokenizer and class names are taken instead.

    Raises UserError for a value that cannot work, or data that are not there.
    """
    config = holdout.resolve(config).copy_and_resolve_references()
    data = config.data
    for name in ("train_ops", "eval_ops"):
        ops_lib.parse(data[name])
    if not reading.is_weights(trained_tokenizer(config)):
        tokenizer_config(config)
    featured = words_are_features(config)
    if featured and not config.text_encoder:
        raise UserError(
            f"model.feature_width={config.model.feature_width} needs features of the words: give the folder of a"
            " language model that reads them, --config.text_encoder=FOLDER --config.model.feature_width=0."
        )
    if featured and data.image_to_text:
        raise UserError("a decoder over a text encoder writes no captions: set data.image_to_text=0.")

    # --- The data, and what the config leaves to them.
    opened = {split: sources.open_source(data[split]) for split in ("train", "validation")}
    from_data.conditions(config, opened["train"])
    if featured and data.text_length is None:
        data.text_length = data.max_text_length
    needs = "label" if data.use_labels else "captions" if data.text_vocab_size or featured else None
    for source in opened.values():
        if needs:
            sources.check(source, needs)
    encode = "codes" not in sources.first_record(opened["train"])
    if not config.tokenizer and (encode or config.sample_prompts or config.eval_samples):
        what = f"encodes the images of {data.train}" if encode else "draws samples (sample_prompts, eval_samples)"
        raise UserError(
            f"this training {what}, and config.tokenizer is empty: type --config.tokenizer=WORKDIR, of a trained"
            f" tokenizer, or --config.tokenizer={UNTRAINED} to try things out on codes that are noise."
        )
    text, labels = (None, opened["train"].label_names) if workdir is None else from_data.stored(workdir)
    if data.use_labels:  # names decide, whatever a folder's own numbers are
        opened = {split: mixture.renumber(source, labels) for split, source in opened.items()}
    texts: list[str] = []
    wordless = featured or not (data.text_tokenizer or data.text_vocab_size)
    if text is None and not wordless and not (data.use_labels and not from_data.has_captions(opened["train"])):
        texts = from_data.captions(opened["train"], data.text_tokenizer_examples)
        if data.text_tokenizer:
            text = text_lib.load_tokenizer(data.text_tokenizer)
        else:
            text = text_lib.train_tokenizer(texts, data.text_vocab_size)
    text = text or text_lib.no_words()
    notes = from_data.lengths(config, text, texts)
    if data.use_labels:
        notes += (("classes", f"{len(labels)}: {', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}"),)
        if data.num_classes not in (0, len(labels)):
            raise UserError(
                f"config.data.num_classes={data.num_classes}, and {data.train} has {len(labels)} classes: set"
                f" --config.data.num_classes={len(labels)}, or 0 to take what the data have."
            )
    from_data.prompts(config, opened["validation"], labels)

    built = dataclasses.replace(_build(config, text, labels, opened, encode, len(labels)), notes=notes)
    for split, source in opened.items():
        _check_codes(built, split, source)
        if encode:
            _check_images(built, split, source)
    check_ranges(config, TRAINING_RANGES, "--config.")
    if built.model.position == "learned" and built.model.max_length <= built.layout.max_position:
        raise UserError(
            f"model.max_length={built.model.max_length} learned positions are too few for sequences that go to position"
            f" {built.layout.max_position}: set --config.model.max_length={built.layout.max_position + 1} or more."
        )
    sampling_of(config)
    if config.eval_samples:
        from imagegpt_jax.metrics import generation  # and with it all networks

        generation.check_config(config)
    return built


def sampling_of(config: Config) -> settings.Sampling:
    """How evaluations draw: `config.sampling`. Raises UserError for a value that is not possible."""
    try:
        return settings.read(config.sampling)
    except UserError as e:
        raise UserError(f"config.sampling cannot be used: {e}") from e


def setup_for_inference(config: Config, workdir: epath.PathLike) -> Setup:
    """Like `setup` for a finished run: takes text tokenizer and class names from the workdir and opens no data."""
    text, labels = from_data.stored(workdir)
    return _build(config, text, labels, {}, False, len(labels), train=False)


def setup_abstract(config: Config) -> Setup:
    """Like `setup` from the config alone (see `from_data.assumed`), for token shards: to compile, not to run."""
    config = from_data.assumed(config)
    return _build(config, None, (), {}, False, config.data.num_classes)


def save_assets(setup: Setup, workdir: epath.PathLike) -> None:
    """Keeps in the workdir what sampling needs beside config and checkpoints."""
    folder = epath.Path(workdir)
    setup.text.save(folder / "text_tokenizer")
    (folder / "labels.json").write_text(json.dumps(setup.labels))


def facts(setup: Setup) -> dict[str, Any]:
    """What a run is made of besides its config."""
    data = [source.fingerprint for source in setup.sources.values()]
    return {"data": data, "text_tokenizer": setup.text.fingerprint}


def notes(setup: Setup) -> from_data.Notes:
    """What is told before the first step: text and classes, pictures and codes."""
    (rows, columns), tokenizer = setup.layout.grid, setup.tokenizer.model
    height, width = rows * tokenizer.downsample, columns // tokenizer.quantizer.codes_per_vector * tokenizer.downsample
    codes = f"{height} x {width} pixels, {rows} x {columns} codes of {setup.space.num_codes}"
    return (*setup.notes, ("pictures", codes))


def encoder_params(setup: Setup, sharding_tree: Any = None) -> train_state.Params:
    """Parameters of the text encoder."""
    assert setup.encoder is not None
    params = setup.encoder.params()
    return params if sharding_tree is None else sharding.put_whole(params, sharding_tree)


def _check_codes(setup: Setup, split: str, source: Any) -> None:
    """Raises UserError if token shards were made by a tokenizer of another shape, or images do not fit the grid."""
    record = sources.first_record(source)
    if "codes" not in record:
        if "tokenizer" not in setup.networks:
            raise UserError(
                f"config.data.{split} holds images and config.data.train token shards: encode both, or none."
            )
        return
    if "tokenizer" in setup.networks:
        raise UserError(f"config.data.{split} holds token shards and config.data.train images: encode both, or none.")
    grid = tuple(int(x) for x in record["grid"])
    if grid != tuple(setup.layout.grid):
        raise UserError(
            f"the token shards {source.name} have a grid of {grid[0]} x {grid[1]} codes, and config.data.grid is"
            f" {tuple(setup.layout.grid)}: set --config.data.grid={grid}."
        )
    made_with = getattr(source, "info", {}).get("num_codes", setup.space.num_codes)
    if made_with != setup.space.num_codes:
        raise UserError(
            f"the token shards {source.name} hold codes of a codebook of {made_with}, and config.tokenizer ="
            f" {setup.config.tokenizer!r} has {setup.space.num_codes}: give the tokenizer that made them."
        )


def _check_images(setup: Setup, split: str, source: Any) -> None:
    """Raises UserError if the first image of a split does not give the codes of the config's grid.

    Else that would show in the trace of the first step.
    """
    shape, ops = splits.first_shape(setup.config, split, source), splits.ops_key(split)
    if shape is None:
        return
    (height, width, _), tokenizer = shape, setup.tokenizer.model
    pixels, codes = tokenizer.downsample, tokenizer.quantizer.codes_per_vector
    grid = (height // pixels, width // pixels * codes)
    if height % pixels or width % pixels:
        raise UserError(
            f"config.data.{ops} gives images of {height} x {width} pixels, and the tokenizer takes sides that are"
            f" multiples of {pixels}: change the size there."
        )
    if grid != tuple(setup.layout.grid):
        raise UserError(
            f"config.data.{ops} gives images of {height} x {width} pixels, which are {grid[0]} x {grid[1]} codes, and"
            f" config.data.grid is {tuple(setup.layout.grid)}: set --config.data.grid={grid}, or change the size there."
        )


def check_mesh(setup: Setup, mesh: Mesh) -> None:
    """Raises UserError if the network cannot be sharded over the mesh: it names the numbers and what would do."""
    model = setup.model
    if model.attention == "cudnn":
        with jax.set_mesh(mesh):
            platform = sharding.platform()
        if platform not in ("gpu", "cuda"):
            raise UserError(
                f"model.attention='cudnn' needs a GPU, and the mesh is of {platform} devices: set"
                " --config.model.attention=auto, which takes what there is."
            )
    sizes = {"heads": model.heads, "kv_heads": model.num_kv_heads, "mlp_width": model.mlp_width, "width": model.width}
    sharding.check_divides({f"model.{name}": size for name, size in sizes.items()}, "tensor", mesh)
    tensor = mesh.shape["tensor"]
    if model.vocab_size % tensor:
        raise UserError(
            f"a vocabulary of {model.vocab_size} ids does not divide over mesh.tensor={tensor}: set"
            f" --config.data.vocab_multiple={math.lcm(setup.config.data.vocab_multiple, tensor)}, which fills it up."
        )
    train_state.check_layout(setup.networks, mesh)


def tokenizer_params(setup: Setup, sharding_tree: Any = None) -> train_state.Params:
    """Parameters of the image tokenizer: from its workdir or weights, or those of the untrained one."""
    source = trained_tokenizer(setup.config)
    if reading.is_weights(source):
        params = reading.load_for(source, "tokenizer", setup.tokenizer.networks["generator"])
        return params if sharding_tree is None else sharding.put_whole(params, sharding_tree)
    if source:
        task = interface.find(setup.tokenizer.config.task)
        abstract = train_state.abstract(task.init_state, setup.tokenizer)
        return checkpoint.load_params(source, abstract, "generator", sharding=sharding_tree)
    return jax.device_put(setup.untrained_tokenizer, sharding_tree)
