"""Stage 2: a GPT over one sequence of text and image tokens.

Trains on token shards made by `imagegpt_jax.encode`, or on images that a frozen tokenizer encodes within the step.

Shapes: B batch, T text region, N image codes, L sequence, D model width, V vocabulary.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imagegpt_jax import checkpoint, flops, fsdp, metrics, optim, sharding, token_loss
from imagegpt_jax import config as config_lib
from imagegpt_jax import state as state_lib
from imagegpt_jax.accumulate import accumulate
from imagegpt_jax.cli import UserError
from imagegpt_jax.config import Config, to_dataclass
from imagegpt_jax.data import ops as ops_lib
from imagegpt_jax.data import order, packing, pipeline, sources
from imagegpt_jax.data import text as text_lib
from imagegpt_jax.evals import common, likelihood
from imagegpt_jax.generate import Sampling, generate_codes
from imagegpt_jax.images import Tile, grid, to_uint8
from imagegpt_jax.models import gpt, layers
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.state import Network, TrainState
from imagegpt_jax.tasks import tokenizer as tokenizer_task

# Shown beside the progress bar.
SHOWN = ("loss", "image_bits_per_token", "unigram_image_bits_per_token")
# Rows that an accelerator's kernels work on at once.
TILE = 128
# Keep the draws of guidance dropout and direction apart from each other and from the pipeline's.
_DROP, _DIRECTION = 1 << 42, 1 << 43


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The static part of the stage.

    Attributes:
      config: the run's config.
      model: shape of the decoder.
      layout: token space and sequence layout.
      text: text tokenizer; None where the setup is abstract.
      labels: class names, may be empty.
      networks: "decoder", and "tokenizer" where images are encoded within the step.
      optimizers: of "decoder".
      tokenizer: the image tokenizer's static part.
      sources: split -> opened source; empty for inference.
    """

    config: Config
    model: GPTConfig
    layout: packing.Layout
    text: Any
    labels: tuple[str, ...]
    networks: dict[str, Network]
    optimizers: dict[str, optax.GradientTransformation]
    tokenizer: tokenizer_task.Setup
    sources: dict[str, Any]

    @property
    def space(self) -> packing.TokenSpace:
        """The one vocabulary."""
        return self.layout.space


def tokenizer_config(config: Config) -> Config:
    """Config of the image tokenizer that a decoder's config names; "" is an untrained one, seeded by `config.seed`."""
    if config.tokenizer:
        found = config_lib.load(config.tokenizer)
        if found.task != "tokenizer":
            raise UserError(f"config.tokenizer={config.tokenizer} holds a {found.task}: give a tokenizer's workdir.")
        return found
    untrained = ConfigDict(config.untrained_tokenizer.to_dict())
    untrained.seed = config.seed
    return untrained


def _build(
    config: Config,
    text: text_lib.TextTokenizer | None,
    labels: tuple[str, ...],
    opened: dict[str, Any],
    encode: bool,
    num_classes: int,
) -> Setup:
    data = config.data
    image_tokenizer = tokenizer_task.setup_for_inference(tokenizer_config(config), config.tokenizer)
    space = packing.TokenSpace(
        text_vocab=data.text_vocab_size if text is None else text.vocab_size,
        num_classes=num_classes if data.use_labels else 0,
        num_codes=image_tokenizer.model.quantizer.num_codes,
    )
    layout = packing.Layout(
        space=space,
        text_length=data.text_length,
        grid=tuple(data.grid),
        text_weight=data.text_weight,
        image_weight=data.image_weight,
    )
    rows = math.ceil(space.vocab_size / data.vocab_multiple) * data.vocab_multiple
    model = to_dataclass(GPTConfig, {**config.model.to_dict(), "vocab_size": rows})
    networks = {"decoder": state_lib.network(lambda key: gpt.GPT(model, key=key))}
    optimizers = {"decoder": optim.make(config.optim, config.steps, networks["decoder"].axes)}
    if encode:
        networks["tokenizer"] = image_tokenizer.networks["generator"]
    return Setup(config, model, layout, text, labels, networks, optimizers, image_tokenizer, opened)


def setup(config: Config) -> Setup:
    """Reads the config, opens the data, and reads or trains the text tokenizer.

    Raises:
      UserError: for a value that cannot work, or data that are not there.
    """
    data = config.data
    for name in ("train_ops", "eval_ops"):
        ops_lib.parse(data[name])
    tokenizer_config(config)
    needs = "label" if data.use_labels else "captions" if data.text_length else None
    opened = {split: sources.open_source(data[split], require=needs) for split in ("train", "validation")}
    if data.text_tokenizer:
        text = text_lib.load_tokenizer(data.text_tokenizer)
    else:
        text = text_lib.train_tokenizer(_captions(opened["train"], data.text_tokenizer_examples), data.text_vocab_size)
    encode = "codes" not in opened["train"].__getitems__([0])[0]
    labels = opened["train"].label_names
    if data.use_labels and data.num_classes not in (0, len(labels)):
        raise UserError(
            f"config.data.num_classes={data.num_classes}, and {data.train} has {len(labels)} classes: set"
            f" --config.data.num_classes={len(labels)}, or 0 to take what the data have."
        )
    built = _build(config, text, labels, opened, encode, len(labels))
    for split, source in opened.items():
        _check_codes(built, split, source)
    return built


def setup_for_inference(config: Config, workdir: epath.PathLike) -> Setup:
    """Like `setup` for a finished run: takes text tokenizer and class names from the workdir and opens no data."""
    folder = epath.Path(workdir)
    text = text_lib.load_tokenizer(folder / "text_tokenizer")
    labels = tuple(json.loads((folder / "labels.json").read_text()))
    return _build(config, text, labels, {}, False, len(labels))


def setup_abstract(config: Config) -> Setup:
    """Like `setup` from the config alone, for token shards: enough to compile, not to run."""
    return _build(config, None, (), {}, False, config.data.num_classes)


def abstract_batch(setup: Setup, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `batches` gives and the devices see."""
    packed = setup.layout.pack(None, None, np.zeros((1, setup.layout.num_codes), np.int32))
    packed["position"] = np.zeros(1, np.int64)
    return {name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for name, x in packed.items()}


def save_assets(setup: Setup, workdir: epath.PathLike) -> None:
    """Keeps in the workdir what sampling needs beside config and checkpoints."""
    folder = epath.Path(workdir)
    setup.text.save(folder / "text_tokenizer")
    (folder / "labels.json").write_text(json.dumps(setup.labels))


def _captions(source: Any, limit: int) -> list[str]:
    """All captions of at most `limit` records, evenly spread."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source)), dtype=np.int64))
    return [caption for record in source.__getitems__(indices.tolist()) for caption in record.get("captions", [])]


def _check_codes(setup: Setup, split: str, source: Any) -> None:
    """Raises UserError if token shards were made by a tokenizer of another shape, or images do not fit the grid."""
    record = source.__getitems__([0])[0]
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


def check_mesh(setup: Setup, mesh: Mesh) -> None:
    """Raises UserError if the network cannot be cut over the mesh: it names the numbers and what would do."""
    model = setup.model
    heads = {"model.heads": model.heads, "model.kv_heads": model.num_kv_heads, "model.mlp_width": model.mlp_width}
    sharding.check_divides(heads, "tensor", mesh)
    if model.vocab_size % mesh.shape["tensor"]:
        raise UserError(
            f"a vocabulary of {model.vocab_size} ids does not divide over mesh.tensor={mesh.shape['tensor']}: set"
            " --config.data.vocab_multiple=128, which fills it up."
        )
    state_lib.check_layout(setup.networks, mesh)


def phase(setup: Setup, step: int) -> str:
    """There is one compiled step."""
    del setup, step
    return "train"


def phases(setup: Setup) -> tuple[str, ...]:
    """All values of `phase`."""
    del setup
    return ("train",)


def step_flops(setup: Setup, phase: str, batch: Mapping[str, Any]) -> float:
    """Model FLOPs of a training step: three forward passes. Encoding images within the step is not counted."""
    del phase
    layout = setup.layout
    length = _used_length(setup)
    scored = [(layout.image_ids[1], layout.num_codes)]
    if layout.text_length:
        scored.append((layout.text_ids[1], layout.text_length + 1))
    return 3 * flops.decoder_forward(setup.model, batch["tokens"].shape[0], length, scored)


def forward_flops(setup: Setup, batch_size: int, length: int, scored: int, context: int = 0) -> float:
    """Model FLOPs of `length` tokens after `context` others, of which the last `scored` are scored as codes."""
    return flops.decoder_forward(setup.model, batch_size, length, [(setup.layout.image_ids[1], scored)], context)


def init_state(setup: Setup, key: jax.Array) -> TrainState:
    """The first TrainState; pure. An untrained tokenizer is drawn here, a trained one is read by `load_frozen`."""
    return state_lib.init(
        setup.networks,
        setup.optimizers,
        {},
        key,
        frozen=setup.config.frozen,
        frozen_networks=("tokenizer",),
        ema=("decoder",) if setup.config.ema_decay else (),
    )


def load_frozen(setup: Setup, state: TrainState, layout: TrainState) -> TrainState:
    """Puts the trained tokenizer's parameters into a new state."""
    if "tokenizer" not in setup.networks:
        return state
    params = tokenizer_params(setup, layout.frozen["tokenizer"])
    return dataclasses.replace(state, frozen={**state.frozen, "tokenizer": params})


def tokenizer_params(setup: Setup, sharding_tree: Any = None) -> state_lib.Params:
    """Parameters of the image tokenizer: from its workdir, or those of the untrained one."""
    if setup.config.tokenizer:
        make = functools.partial(tokenizer_task.init_state, setup.tokenizer)
        abstract = jax.eval_shape(make, jax.eval_shape(jax.random.key, 0))
        return checkpoint.load_params(setup.config.tokenizer, abstract, "generator", sharding=sharding_tree)
    return jax.device_put(_untrained(setup), sharding_tree)


@functools.cache
def _untrained(setup: Setup) -> state_lib.Params:
    """Parameters of the untrained image tokenizer, drawn once: compiling that takes seconds.

    Host arrays, since a training step donates what it is given.
    """
    init = tokenizer_task.init_state
    draw = jax.jit(lambda key: init(setup.tokenizer, key).params("generator"))
    return jax.device_get(draw(jax.random.key(setup.tokenizer.config.seed)))


def batches(setup: Setup, split: str, *, batch_size: int, position: int = 0, rows: np.ndarray | None = None) -> Any:
    """Packed batches of a split: shuffled and endless for "train", once and in order otherwise."""
    data = setup.config.data
    train = split == "train"
    return pipeline.Batches(
        setup.sources[split],
        ops=data.train_ops if train else data.eval_ops,
        batch_size=batch_size,
        seed=setup.config.seed,
        position=position,
        rows=rows,
        shuffle=train,
        epochs=None if train else 1,
        host_fn=functools.partial(pack, setup, train=train),
    )


def pack(setup: Setup, batch: dict[str, np.ndarray], *, train: bool) -> dict[str, np.ndarray]:
    """Captions, labels and codes -> sequences. Guidance dropout and direction of an example depend on its position.

    Where the batch holds images, the places of their codes are filled in by `prepare_batch`.
    """
    data, seed = setup.config.data, setup.config.seed
    positions_B = batch["position"]
    texts = setup.text.encode_batch([str(c) for c in batch["caption"]]) if "caption" in batch else None
    codes_BN = batch.get("codes")
    if codes_BN is None:
        codes_BN = np.zeros((len(positions_B), setup.layout.num_codes), np.int32)
    draws = {
        name: order.hash_positions(positions_B, seed, use) / 2.0**64
        for name, use in (("drop", _DROP), ("direction", _DIRECTION))
    }
    packed = setup.layout.pack(
        texts if data.text_length else None,
        batch["label"] if data.use_labels else None,
        codes_BN,
        (draws["direction"] < data.image_to_text) * packing.IMAGE_TO_TEXT if train else None,
        (draws["drop"] < data.guidance_dropout) if train else None,
    )
    keep = {name: batch[name] for name in ("image", "mask", "position") if name in batch}
    return packed | keep


def _used_length(setup: Setup) -> int:
    """How many tokens of a sequence go through the blocks.

    Nothing is predicted from the last code and the end of a picture: they are left out where that saves a tile of 128.
    """
    layout = setup.layout
    used = layout.text_length + layout.num_codes
    if setup.config.data.image_to_text or -(-used // TILE) == -(-layout.length // TILE):
        return layout.length
    return used


def _parts(setup: Setup, tokens_BL: jax.Array) -> list[tuple[int, int | jax.Array, int, tuple[int, int]]]:
    """Where the targets of each kind are: (kind, first place of each sequence, number of places, ids it can have).

    Where no sequence of the run is turned around, the first place is a plain number, and no gather is needed.
    """
    layout = setup.layout
    image, text = (layout.text_length, 0) if not setup.config.data.image_to_text else _starts(layout, tokens_BL)
    parts = [(packing.IMAGE, image, layout.num_codes, layout.image_ids)]
    if layout.text_length:
        parts.append((packing.TEXT, text, layout.text_length + 1, layout.text_ids))
    return parts


def _places(x_BL: jax.Array, start: int | jax.Array, count: int) -> jax.Array:
    """`count` places of each sequence from `start` on."""
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x_BL, start, start + count, axis=1)
    index_BM = start[:, None] + jnp.arange(count)
    return jnp.take_along_axis(x_BL, index_BM.reshape(*index_BM.shape, *(1,) * (x_BL.ndim - 2)), axis=1)


def _starts(layout: packing.Layout, tokens_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the first image target and the first text target of each sequence are (they differ by direction)."""
    reverse_B = tokens_BL[:, 0] == layout.space.boi
    image_B = jnp.where(reverse_B, 0, layout.text_length)
    text_B = jnp.where(reverse_B, layout.num_codes + 1, 0)
    return image_B, text_B


def prepare_batch(setup: Setup, state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Encodes the batch's images with the frozen tokenizer and puts their codes into the sequences."""
    if "tokenizer" not in setup.networks:
        return batch
    return _encode_into(setup, state.frozen["tokenizer"], batch)


def _encode_into(setup: Setup, params: state_lib.Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    module: Any = setup.networks["tokenizer"].module(params)
    codes_Bhw = module.encode_codes(batch["image"])
    if codes_Bhw.shape[1:] != tuple(setup.layout.grid):
        raise UserError(
            f"images of {batch['image'].shape[1]} x {batch['image'].shape[2]} pixels give {codes_Bhw.shape[1:]} codes,"
            f" and config.data.grid is {tuple(setup.layout.grid)}: change one of them."
        )
    ids_BN = codes_Bhw.reshape(codes_Bhw.shape[0], -1) + setup.space.image_start
    index_BN = _starts(setup.layout, batch["tokens"])[0][:, None] + jnp.arange(ids_BN.shape[1])
    put = jax.vmap(lambda row, index, ids: row.at[index].set(ids))
    return {
        **batch,
        "targets": put(batch["targets"], index_BN, ids_BN),
        "tokens": put(batch["tokens"], index_BN + 1, ids_BN),
    }


def token_nll(setup: Setup, module: Any, batch: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
    """Negative log-likelihood in nats of each target [B, L]; 0 where there is none.

    The kind of each target is known from its place, so each is scored among the ids of its own kind: an image code
    among the codebook, a word among everything else. Only the places of that kind are multiplied with that
    part of the table.
    """
    sequence = gpt.Sequence.from_batch(batch).first(_used_length(setup))
    hidden_BLD = module(sequence, key=key).hidden
    places = {name: batch[name] for name in ("tokens", "targets", "kind")}

    def rows(hidden_BLD: jax.Array, head: Any, batch: dict[str, jax.Array], gather: fsdp.Gather) -> jax.Array:
        head = gather(head)
        nll_BL = jnp.zeros(batch["tokens"].shape, layers.wide(hidden_BLD.dtype))
        for kind, start, count, (first_id, num_ids) in _parts(setup, batch["tokens"]):
            hidden_BMD, targets_BM, kind_BM = (
                _places(x, start, count) for x in (hidden_BLD, batch["targets"], batch["kind"])
            )
            targets_BM = jnp.clip(targets_BM - first_id, 0, num_ids - 1)
            table_VD = head.rows(first_id, num_ids)
            nll_BM = token_loss.token_nll(hidden_BMD, table_VD, targets_BM, chunk=setup.config.logit_chunk)
            nll_BM = jnp.where(kind_BM == kind, nll_BM, 0.0)
            if isinstance(start, int):
                nll_BL = nll_BL.at[:, start : start + count].add(nll_BM)
            else:
                index_BM = start[:, None] + jnp.arange(count)
                nll_BL = jax.vmap(lambda row, index, nll: row.at[index].add(nll))(nll_BL, index_BM, nll_BM)
        return nll_BL

    return fsdp.run(rows, hidden_BLD, module.output_head, places, layers.as_dtype(setup.model.dtype))


def train_step(setup: Setup, phase: str, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Any]:
    """One optimizer step.

    Args:
      setup: the stage.
      phase: "train".
      state: before the step.
      batch: packed sequences, see `data/packing.py`.

    Returns:
      (state after the step, metrics)
    """
    del phase
    config, net, frozen = setup.config, setup.networks["decoder"], state.frozen["decoder"]
    params = state.trainable["decoder"]
    total_weight = jnp.maximum(batch["weights"].astype(layers.wide(config.model.dtype)).sum(), 1.0)
    keys_B = None
    if any(config.model[f"{name}_dropout"] for name in ("token", "residual", "mlp", "attention")):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch["tokens"].shape[0]))

    def part(rows: tuple[dict[str, jax.Array], Any]) -> tuple[Any, metrics.Totals, jax.Array]:
        batch, keys_B = rows

        def loss_fn(params: state_lib.Params) -> tuple[jax.Array, jax.Array]:
            nll_BL = token_nll(setup, net.module(state_lib.join(params, frozen)), batch, keys_B)
            return (nll_BL * batch["weights"]).sum() / total_weight, nll_BL

        (loss, nll_BL), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (loss, grads), {}, nll_BL

    (loss, grads), _, nll_BL = accumulate(part, (batch, keys_B), config.accumulate)
    updates, opt = setup.optimizers["decoder"].update(grads, state.opt["decoder"], params)
    params = optax.apply_updates(params, updates)

    values: metrics.Totals = {"loss": metrics.mean(loss), "gradient_norm": metrics.mean(optax.global_norm(grads))}
    for name, kind in (("image", packing.IMAGE), ("text", packing.TEXT)):
        scored_BL = (batch["kind"] == kind).astype(jnp.float32)
        counts_V = _count(batch["targets"], scored_BL, setup.space.vocab_size)
        values[f"{name}_bits_per_token"] = metrics.mean(nll_BL / jnp.log(2.0), scored_BL)
        values[f"unigram_{name}_bits_per_token"] = metrics.entropy(counts_V)
    ema = {name: optim.update_ema(old, params, config.ema_decay, state.step) for name, old in state.ema.items()}
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        trainable={**state.trainable, "decoder": params},
        opt={**state.opt, "decoder": opt},
        ema=ema,
    )
    return state, values


def _count(ids_BL: jax.Array, weights_BL: jax.Array, size: int) -> jax.Array:
    """Sum of the weights of each id. Each device counts its own rows: a scatter of all rows would gather all ids."""

    def count(ids_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
        return jnp.zeros((1, size), weights_BL.dtype).at[0, ids_BL].add(weights_BL)

    rows = ("batch", None)
    return sharding.map_shards(count, (rows, rows), rows)(ids_BL, weights_BL).sum(axis=0)


def predict_fns(setup: Setup) -> dict[str, Callable[..., Any]]:
    """Pure functions: "nll" of (parameters of "decoder", packed batch) -> [B, L] in nats."""
    net = setup.networks["decoder"]

    def nll(params: state_lib.Params, batch: dict[str, jax.Array]) -> jax.Array:
        return token_nll(setup, net.module(params), batch)

    return {"nll": nll}


def evaluate(setup: Setup, state: TrainState, mesh: Mesh) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Scores the validation split; also samples a fixed grid of pictures for TensorBoard."""
    config = setup.config
    params = {"decoder": state.eval_params("decoder")}
    columns = likelihood.COLUMNS
    if "tokenizer" in setup.networks:
        params["tokenizer"], columns = state.params("tokenizer"), (*columns, "image")
    rows = sharding.host_rows(mesh, config.eval_batch_size)
    scores = likelihood.evaluate(
        _scorer(setup),
        params,
        batches(setup, "validation", batch_size=config.eval_batch_size, rows=rows),
        setup.space.vocab_size,
        mesh,
        columns,
    )
    images = {"samples": _sample_grid(setup, params["decoder"])[None]} if config.sample_prompts else {}
    return {f"validation/{name}": value for name, value in scores.items()}, images


def _sample_grid(setup: Setup, params: state_lib.Params) -> np.ndarray:
    """Four pictures of each of `config.sample_prompts`, captioned: uint8 [H, W, C], the same draws every time.

    Every process draws them on its first device, so that the mesh of the training does not matter.
    """
    config, first = setup.config, jax.local_devices()[:1]
    prompts = [prompt for prompt in config.sample_prompts for _ in range(4)]
    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, first)):
        params = jax.device_put(common.to_host(params), first[0])
        module: Any = setup.networks["decoder"].module(params)
        codes_BN = generate_codes(
            module,
            setup.layout,
            setup.text.encode_batch(prompts),
            sampling=Sampling(**config.sampling.to_dict()),
            seed=config.seed,
            tile=len(prompts),
        )
        pictures = to_uint8(np.asarray(_decoder_of_codes(setup)(codes_BN.reshape(-1, *setup.layout.grid))))
    tiles = [Tile(prompt, list(pictures[4 * i : 4 * i + 4])) for i, prompt in enumerate(config.sample_prompts)]
    return grid(tiles)


@functools.cache
def _decoder_of_codes(setup: Setup) -> Callable[[np.ndarray], jax.Array]:
    """Codes [B, h, w] -> pictures, with the image tokenizer's parameters read once."""
    params = tokenizer_params(setup)
    decode = jax.jit(tokenizer_task.predict_fns(setup.tokenizer)["decode"])
    return lambda codes_Bhw: decode(params, codes_Bhw)


@functools.cache
def _scorer(setup: Setup) -> Callable[..., Any]:
    """The same function object every time, with which an evaluation keeps its compiled program."""
    nll = predict_fns(setup)["nll"]

    def score(params: dict[str, state_lib.Params], batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        if "tokenizer" in setup.networks:
            batch = _encode_into(setup, params["tokenizer"], batch)
        return nll(params["decoder"], batch), batch["targets"]

    return score
