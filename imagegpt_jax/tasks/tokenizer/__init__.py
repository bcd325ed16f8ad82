"""Stage 1: an image becomes a small grid of discrete codes and back (VQ-GAN; Esser et al. 2021, Yu et al. 2022).

Two compiled steps, before and after the discriminator's start, chosen by the host's step number;
`tasks/tokenizer/adversarial.py` has their losses.

Shapes: B batch, H W C image, h w code grid, V codebook.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imagegpt_jax import train_state
from imagegpt_jax.config import Config, to_dataclass
from imagegpt_jax.data import holdout, ops, sources
from imagegpt_jax.errors import UserError, check_ranges
from imagegpt_jax.metrics.evaluator import Evaluator
from imagegpt_jax.metrics.reconstruction import ReconstructionEvaluator
from imagegpt_jax.models import discriminator, flops, layers, quantizers, vq
from imagegpt_jax.models.pretrained import lpips
from imagegpt_jax.parallel import sharding
from imagegpt_jax.tasks import interface
from imagegpt_jax.tasks.input import batches, first_shape, ops_key
from imagegpt_jax.tasks.tokenizer import adversarial as gan
from imagegpt_jax.train_state import Network, TrainState
from imagegpt_jax.training import config_checks, train_metrics
from imagegpt_jax.training import optimizers as optim
from imagegpt_jax.training.grad_accumulation import accumulate


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The static part of the task: configs, network structures and optimizers, no arrays of a run.

    Attributes:
      config: the run's config.
      model: shape of the tokenizer.
      loss: weights of the losses.
      networks: "generator"; where they take part, "discriminator" and the frozen "perceptual".
      optimizers: of the networks that are trained.
      perceptual: the weights of "perceptual" on the host; None where there is no such loss, or nothing is trained.
      sources: split -> opened source; empty for inference.
    """

    config: Config
    model: vq.VQConfig
    loss: gan.LossConfig
    networks: dict[str, Network]
    optimizers: dict[str, optax.GradientTransformation]
    perceptual: train_state.Params | None
    sources: dict[str, Any]


def _build(
    config: Config, opened: dict[str, Any], perceptual: str = "", weights: train_state.Params | None = None
) -> Setup:
    """`perceptual` names the network of the perceptual loss, if there is one."""
    model = to_dataclass(vq.VQConfig, config.model)
    loss = to_dataclass(gan.LossConfig, config.loss)
    if bool(loss.logit_laplace) != model.logit_laplace:
        raise UserError(
            f"loss.logit_laplace={loss.logit_laplace} and model.logit_laplace={model.logit_laplace} go together: the"
            " loss is of the distributions that the decoder then gives."
        )
    networks = {"generator": train_state.network(lambda key: vq.VQModel(model, key=key))}
    check_ranges(config, {"ema_decay": optim.EMA_DECAY}, "--config.")
    trained = config_checks.trained_axes("generator", networks["generator"].axes, config.frozen)
    optimizers = {"generator": optim.make(config.optim, config.steps, trained)}
    if loss.gan_start >= 0:
        critic = to_dataclass(discriminator.DiscriminatorConfig, config.discriminator)
        networks["discriminator"] = train_state.network(lambda key: discriminator.make(critic, key=key))
        trained, _ = train_state.partition(networks["discriminator"].axes, config.frozen)  # it may be frozen whole
        optimizers["discriminator"] = optim.make(
            config.discriminator_optim, config.steps, trained, key="discriminator_optim"
        )
    if perceptual:
        dtype = layers.accumulation_dtype(config.model.dtype)
        networks["perceptual"] = train_state.network(lambda key: lpips.LPIPS(perceptual, dtype=dtype, key=key))
    return Setup(config, model, loss, networks, optimizers, weights, opened)


def setup(config: Config) -> Setup:
    """Reads the config and opens the data.

    Raises UserError for a value that cannot work, or data that are not there.
    """
    config = holdout.resolve(config)
    for split in ("train_ops", "eval_ops"):
        ops.parse(config.data[split])
    loss = config.loss
    if not (loss.l1 or loss.l2 or loss.logit_laplace or loss.lpips or loss.others):
        raise UserError(
            "config.loss has no weight for what is given back: l1, l2, logit_laplace and lpips are 0. Set"
            " --config.loss.l2=1, for example."
        )
    opened = {split: sources.open_source(config.data[split], require="image") for split in ("train", "validation")}
    perceptual, weights = "", None
    if config.loss.lpips:
        if not config.loss.lpips_weights:
            raise UserError(
                "config.loss.lpips > 0 needs config.loss.lpips_weights=FILE.safetensors: make it with"
                " `python tools/convert_lpips.py --network=vgg16 --output=FILE.safetensors`."
            )
        trained = lpips.LPIPS.load(config.loss.lpips_weights)
        perceptual, weights = trained.network, jax.device_get(train_state.split(trained)[1])
    if config.eval_features:
        from imagegpt_jax.metrics import networks

        name, _, path = config.eval_features.partition("=")
        networks.check_weights(name, path, "--config.eval_features=NAME=FILE")
    built = _build(config, opened, perceptual, weights)
    channels = built.model.in_channels
    if not built.model.decoder or built.model.image_channels != channels:
        raise UserError(
            "a tokenizer is trained to give back what it is given: set --config.model.decoder=True"
            " --config.model.out_channels=0."
        )
    if "discriminator" in built.networks and config.discriminator.in_channels != channels:
        raise UserError(
            f"discriminator.in_channels={config.discriminator.in_channels} and model.in_channels={channels} are of the"
            f" same images: set --config.discriminator.in_channels={channels}."
        )
    for split, source in opened.items():
        _check_images(built, split, source)
    return built


def _check_images(setup: Setup, split: str, source: Any) -> None:
    """Raises UserError if the first image of a split does not fit the networks that see it.

    Else that would show in the trace of a step: the discriminator's after `loss.gan_start` steps.
    """
    shape = first_shape(setup.config, split, source)
    if shape is None:
        return
    calls = {"generator": "encode", "discriminator": "__call__"} if split == "train" else {"generator": "encode"}
    for name, call in calls.items():
        if name in setup.networks:
            net = setup.networks[name]
            params = train_state.split(net.abstract)[1]
            image_BHWC = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
            try:
                jax.eval_shape(lambda p, x, net=net, call=call: getattr(net.module(p), call)(x), params, image_BHWC)
            except UserError as e:
                raise UserError(f"config.data.{ops_key(split)} and the {name} do not go together: {e}") from e


def setup_for_inference(config: Config, workdir: epath.PathLike) -> Setup:
    """Like `setup` for a finished run: opens no data and no loss networks."""
    del workdir  # a tokenizer has no assets beside its checkpoints
    return _build(config, {})


def setup_for_weights(model: Any, network: Network) -> Setup:
    """Like `setup_for_inference` for weights that were published without a run: the network alone."""
    never = gan.LossConfig(l1=0, l2=0, lpips=0, lpips_weights="", gan=0, gan_kind="hinge", gan_start=-1, adaptive=False)
    return Setup(ConfigDict({"task": "tokenizer"}), model, never, {"generator": network}, {}, None, {})


def setup_abstract(config: Config) -> Setup:
    """Like `setup` from the config alone, with the perceptual loss of VGG-16 if any: enough to compile, not to run."""
    return _build(config, {}, "vgg16" if config.loss.lpips else "")


def abstract_batch(setup: Setup, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `batches` gives and the devices see."""
    side = setup.config.res
    image = jax.ShapeDtypeStruct((batch_size, side, side, setup.model.in_channels), jnp.float32)
    position = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return {"image": image, "mask": jax.ShapeDtypeStruct((batch_size,), bool), "position": position}


def check_mesh(setup: Setup, mesh: Mesh) -> None:
    """Raises UserError if the networks cannot be sharded over the mesh: it names the numbers and what would do."""
    if setup.model.quantizer.has_codebook:
        sharding.check_divides({"model.quantizer.num_codes": setup.model.quantizer.num_codes}, "tensor", mesh)
    train_state.check_layout(setup.networks, mesh)


def phase(setup: Setup, step: int) -> str:
    """ "reconstruction" before the discriminator's start, "adversarial" from then on."""
    start = setup.loss.gan_start
    return "adversarial" if 0 <= start <= step else "reconstruction"


def phases(setup: Setup) -> tuple[str, ...]:
    """All values of `phase`."""
    return ("reconstruction", "adversarial") if setup.loss.gan_start >= 0 else ("reconstruction",)


def learning_rates(setup: Setup, updates: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Of the generator, which every phase trains, and of the discriminator, if there is one."""
    config, rates = setup.config, {}
    if "adversarial" in updates:
        steps = config.steps, updates["adversarial"]
        rates["discriminator_learning_rate"] = optim.learning_rate(config.discriminator_optim, *steps)
    every = jnp.stack(list(updates.values())).sum()
    return {"learning_rate": optim.learning_rate(config.optim, config.steps, every), **rates}


def step_flops(setup: Setup, phase: str, batch: Mapping[str, Any]) -> float:
    """Model FLOPs of a training step, counted in its trace with plain convolutions and without recomputation."""
    config: Any = ConfigDict(setup.config.to_dict())
    config.model.conv_impl, config.model.remat, config.accumulate = "xla", False, 1
    # Products of Muon's and Shampoo's matrices are none of the model's, and made once a step whatever the batch.
    config.optim.name = config.discriminator_optim.name = "sgd"
    plain = _build(config, {}, "vgg16" if "perceptual" in setup.networks else "")
    state = train_state.abstract(init_state, plain)
    step = functools.partial(train_step, plain, phase)
    count, *sides = batch["image"].shape
    return count * flops.traced(step, state, {"image": jax.ShapeDtypeStruct((1, *sides), jnp.float32)})


def init_state(setup: Setup, key: jax.Array) -> TrainState:
    """The first TrainState; pure. The perceptual network's weights are put in by `load_frozen`."""
    return train_state.init(
        setup.networks,
        setup.optimizers,
        {"quantizer": quantizers.init_stats(setup.model.quantizer), **gan.init_stats(setup.loss)},
        key,
        frozen=setup.config.frozen,
        frozen_networks=("perceptual",),
        ema=("generator",) if setup.config.ema_decay else (),
        phases=phases(setup),
    )


def load_frozen(setup: Setup, state: TrainState, layout: TrainState) -> TrainState:
    """Puts the perceptual network's weights into a new state.

    There, and not in the program, where they would be constants that every device holds whole.
    """
    if setup.perceptual is None:
        return state
    weights = jax.device_put(setup.perceptual, layout.frozen["perceptual"])
    return dataclasses.replace(state, frozen={**state.frozen, "perceptual": weights})


def train_step(setup: Setup, phase: str, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Any]:
    """One optimizer step of the generator, and of the discriminator once it takes part, on images in [-1, 1]."""
    config, loss = setup.config, setup.loss
    adversarial = phase == "adversarial"
    trainable: dict[str, Any] = dict(state.trainable)
    opts = dict(state.opt)
    values: train_metrics.Totals = {}
    logits = None

    def update(gradients: dict[str, Any]) -> None:
        for name, total in gradients.items():
            grads = jax.tree.map(lambda x: x / config.accumulate, total)
            updates, opts[name] = setup.optimizers[name].update(grads, state.opt[name], state.trainable[name])
            trainable[name] = optax.apply_updates(state.trainable[name], updates)
            norm = "gradient_norm" if name == "generator" else f"{name}_gradient_norm"
            values[norm] = train_metrics.mean(optax.global_norm(grads))

    # --- Gradients and optimizers.
    judging = state
    if adversarial and loss.discriminator_first:
        differentiate = functools.partial(gan.discriminator_gradients, setup.networks, loss, state)
        sums, values, _ = accumulate(differentiate, batch["image"], config.accumulate)
        update(sums.gradients)
        logits = sums.logits
        judging = dataclasses.replace(state, trainable={**state.trainable, "discriminator": trainable["discriminator"]})
    differentiate = functools.partial(
        gan.gradients, setup.networks, loss, judging, adversarial=adversarial, judge=not loss.discriminator_first
    )
    sums, measured, vectors = accumulate(differentiate, batch["image"], config.accumulate)
    values |= measured
    update(sums.gradients)
    logits = sums.logits if logits is None else logits
    if logits is not None:
        logits = jax.tree.map(lambda x: x / config.accumulate, logits)

    # --- What codes learn without gradient, and codes that nobody uses.
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    before, moved = _codebook(state.trainable["generator"]), _codebook(trainable["generator"])
    codebook, stats, revived_I = quantizers.learn(
        setup.model.quantizer,
        None if before is None or moved is None else (before, moved),
        state.stats["quantizer"],
        sums.use,
        vectors,
        key,
    )
    values["revived_codes"] = train_metrics.mean(revived_I.sum())
    if codebook is not None:
        trainable["generator"] = {**trainable["generator"], "quantize": {"embedding": codebook}}

    ema = dict(state.ema)
    if "generator" in ema:
        ema["generator"] = optim.update_ema(ema["generator"], trainable["generator"], config.ema_decay, state.step)
        if codebook is not None:
            # The average of a code before and after its revival is neither.
            average = ema["generator"]["quantize"]["embedding"]
            ema["generator"]["quantize"]["embedding"] = jnp.where(revived_I[:, None], codebook, average)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        trainable=trainable,
        opt=opts,
        ema=ema,
        stats={"quantizer": stats, **gan.update_stats(loss, state.stats, logits)},
    )
    return state, values


def _codebook(params: train_state.Params) -> jax.Array | None:
    """The learned codebook among a generator's trained parameters; None where there is none, or it is frozen."""
    return params.get("quantize", {}).get("embedding")


def predict_fns(setup: Setup) -> dict[str, Callable[..., Any]]:
    """Pure functions of (parameters of "generator", input): "reconstruct", "encode", "decode"."""
    net = setup.networks["generator"]

    def reconstruct(params: train_state.Params, images_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        model: Any = net.module(params)
        codes_Bhw = model.encode_codes(images_BHWC)
        return model.decode_codes(codes_Bhw), codes_Bhw

    def encode(params: train_state.Params, images_BHWC: jax.Array) -> jax.Array:
        model: Any = net.module(params)
        return model.encode_codes(images_BHWC)

    def decode(params: train_state.Params, codes_Bhw: jax.Array) -> jax.Array:
        model: Any = net.module(params)
        return model.decode_codes(codes_Bhw)

    return {"reconstruct": reconstruct, "encode": encode, "decode": decode}


def notes(setup: Setup) -> tuple[tuple[str, str], ...]:
    """Sizes of pictures and codes."""
    side, grid = setup.config.res, setup.config.res // setup.model.downsample
    codes = f"{grid} x {grid * setup.model.quantizer.codes_per_vector} codes of {setup.model.quantizer.num_ids}"
    return (("pictures", f"{side} x {side} pixels, {codes}"),)


def evaluators(setup: Setup, mesh: Mesh) -> tuple[Evaluator, ...]:
    """Reconstructions of the validation split, compared as sets too by the network of `config.eval_features`."""
    config, size, network = setup.config, setup.config.eval_batch_size, None
    if config.eval_features:
        from imagegpt_jax.metrics import networks  # and with it all of them

        name, _, path = config.eval_features.partition("=")
        network = networks.load(name, path, "tf1_bilinear")
    split = functools.partial(batches, setup, "validation", batch_size=size, rows=sharding.host_rows(mesh, size))
    reconstruct, num_codes = predict_fns(setup)["reconstruct"], setup.model.quantizer.num_ids
    return (ReconstructionEvaluator(reconstruct, split, num_codes, mesh, network=network, prefix="validation/"),)


TASK = interface.Task(
    kind="tokenizer",
    network="generator",
    setup=setup,
    setup_for_inference=setup_for_inference,
    setup_abstract=setup_abstract,
    init_state=init_state,
    train_step=train_step,
    batches=batches,
    phase=phase,
    phases=phases,
    check_mesh=check_mesh,
    evaluators=evaluators,
    learning_rates=learning_rates,
    progress_metrics=("reconstruction", "psnr", "codebook_usage"),
    finite_metrics=("loss", "gradient_norm", "gan_discriminator", "discriminator_gradient_norm"),
    load_frozen=load_frozen,
    abstract_batch=abstract_batch,
    step_flops=step_flops,
    notes=notes,
)
