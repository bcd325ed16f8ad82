"""Stage 1: an image becomes a small grid of discrete codes and back (VQ-GAN; Esser et al. 2021, Yu et al. 2022).

Two compiled steps, before and after the discriminator's start, chosen by the host's step number.

Shapes: B batch, H W C image, h w code grid, V codebook.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from imagegpt_jax import losses, metrics, optim, sharding
from imagegpt_jax import state as state_lib
from imagegpt_jax.cli import UserError
from imagegpt_jax.config import Config, choose, to_dataclass
from imagegpt_jax.data import ops, pipeline, sources
from imagegpt_jax.evals import reconstruction
from imagegpt_jax.models import discriminator, quantizers, vq
from imagegpt_jax.state import Network, TrainState

# Shown beside the progress bar.
SHOWN = ("reconstruction", "psnr", "codebook_usage")


# Kind -> (generator's loss of fake logits, discriminator's loss of real and fake logits).
GAN_LOSSES = {
    "hinge": (losses.hinge_generator, losses.hinge_discriminator),
    "non_saturating": (losses.nonsaturating_generator, losses.nonsaturating_discriminator),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the tokenizer's losses.

    Attributes:
      l1: weight of the mean absolute error.
      l2: weight of the mean squared error.
      lpips: weight of the perceptual distance; 0 = off.
      lpips_weights: safetensors file made by `tools/convert_lpips.py`, needed if `lpips` > 0.
      gan: weight of the adversarial loss on the generator.
      gan_kind: "hinge" or "non_saturating".
      gan_start: step from which the discriminator takes part; negative = never.
      adaptive: scale the adversarial loss by the ratio of gradient norms at the last layer (arXiv:2012.09841, eq. 7).
    """

    l1: float
    l2: float
    lpips: float
    lpips_weights: str
    gan: float
    gan_kind: str
    gan_start: int
    adaptive: bool

    def __post_init__(self):
        choose("gan_kind", self.gan_kind, GAN_LOSSES)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The static part of the stage: configs, network structures and optimizers, no arrays of a run."""

    config: Config
    model: vq.VQConfig
    loss: LossConfig
    networks: dict[str, Network]
    optimizers: dict[str, optax.GradientTransformation]
    perceptual: Any
    sources: dict[str, Any]


def _build(config: Config, opened: dict[str, Any], perceptual: Any) -> Setup:
    model = to_dataclass(vq.VQConfig, config.model)
    loss = to_dataclass(LossConfig, config.loss)
    networks = {"generator": state_lib.network(lambda key: vq.VQModel(model, key=key))}
    optimizers = {"generator": optim.make(config.optim, config.steps, networks["generator"].axes)}
    if loss.gan_start >= 0:
        critic = to_dataclass(discriminator.DiscriminatorConfig, config.discriminator)
        networks["discriminator"] = state_lib.network(lambda key: discriminator.Discriminator(critic, key=key))
        optimizers["discriminator"] = optim.make(
            config.discriminator_optim, config.steps, networks["discriminator"].axes
        )
    return Setup(config, model, loss, networks, optimizers, perceptual, opened)


def setup(config: Config) -> Setup:
    """Reads the config and opens the data.

    Raises:
      UserError: for a value that cannot work, or data that are not there.
    """
    for split in ("train_ops", "eval_ops"):
        ops.parse(config.data[split])
    opened = {split: sources.open_source(config.data[split]) for split in ("train", "validation")}
    perceptual = None
    if config.loss.lpips:
        if not config.loss.lpips_weights:
            raise UserError(
                "config.loss.lpips > 0 needs config.loss.lpips_weights=FILE.safetensors: make it with"
                " `python tools/convert_lpips.py --network=vgg16 --output=FILE.safetensors`."
            )
        from imagegpt_jax.models.pretrained import lpips

        perceptual = lpips.LPIPS.load(config.loss.lpips_weights)
    return _build(config, opened, perceptual)


def setup_for_inference(config: Config, workdir: epath.PathLike) -> Setup:
    """Like `setup` for a finished run: opens no data and no loss networks."""
    del workdir  # a tokenizer has no assets beside its checkpoints
    return _build(config, {}, None)


def save_assets(setup: Setup, workdir: epath.PathLike) -> None:
    """A tokenizer needs nothing in its workdir but config and checkpoints."""


def phase(setup: Setup, step: int) -> str:
    """ "reconstruction" before the discriminator's start, "adversarial" from then on."""
    start = setup.loss.gan_start
    return "adversarial" if 0 <= start <= step else "reconstruction"


def init_state(setup: Setup, key: jax.Array) -> TrainState:
    """The first TrainState; pure."""
    return state_lib.init(
        setup.networks,
        setup.optimizers,
        {"quantizer": quantizers.init_stats(setup.model.quantizer)},
        key,
        frozen=setup.config.frozen,
        ema=("generator",) if setup.config.ema_decay else (),
    )


def batches(setup: Setup, split: str, *, batch_size: int, position: int = 0, rows: slice | None = None) -> Any:
    """The batches of a split: shuffled, augmented and endless for "train", once and in order otherwise."""
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
    )


def train_step(setup: Setup, phase: str, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Any]:
    """One optimizer step of the generator, and of the discriminator once it takes part.

    Args:
      setup: the stage.
      phase: see `phase`.
      state: before the step.
      batch: {"image": float [B, H, W, C] in [-1, 1]}.

    Returns:
      (state after the step, metrics)
    """
    loss_config, images_BHWC = setup.loss, batch["image"]
    key = jax.random.fold_in(jax.random.key(setup.config.seed), state.step)
    adversarial = phase == "adversarial"
    net, frozen = setup.networks["generator"], state.frozen["generator"]

    # --- Generator forward. Its vjp is kept: the losses' cotangents at the image are combined before one backward pass.
    def forward(params: state_lib.Params) -> Any:
        model: Any = net.module(state_lib.join(params, frozen))
        z = model.encode(images_BHWC)
        quantized, stats = model.quantize(z, state.stats["quantizer"])
        features = model.decode_features(quantized.zq)
        return (model.to_pixels(features), quantized.loss), (quantized, stats, features)

    params = state.trainable["generator"]
    (recon_BHWC, quantizer_loss), pullback, (quantized, stats, features) = jax.vjp(forward, params, has_aux=True)

    def reconstruction_loss(recon: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        parts = {"l1": losses.l1(recon, images_BHWC), "l2": losses.l2(recon, images_BHWC)}
        total = loss_config.l1 * parts["l1"] + loss_config.l2 * parts["l2"]
        if setup.perceptual is not None:
            parts["lpips"] = setup.perceptual(recon, images_BHWC).mean()
            total = total + loss_config.lpips * parts["lpips"]
        return total, parts

    (rec_loss, parts), cotangent = jax.value_and_grad(reconstruction_loss, has_aux=True)(recon_BHWC)
    values = {
        "reconstruction": metrics.mean(rec_loss),
        "psnr": metrics.mean(_psnr(recon_BHWC, images_BHWC)),
        **{name: metrics.mean(value) for name, value in (parts | quantized.losses).items()},
    }

    # --- Adversarial part of the generator's loss.
    if adversarial:
        critic = _critic(setup, state)
        generator_loss, discriminator_loss = GAN_LOSSES[loss_config.gan_kind]
        gan_loss, gan_cotangent = jax.value_and_grad(
            lambda recon: generator_loss(critic(state.trainable["discriminator"], recon))
        )(recon_BHWC)
        weight = jnp.asarray(loss_config.gan, jnp.float32)
        if loss_config.adaptive:
            weight = weight * losses.adaptive_weight(
                _last_layer_gradient(net, state, features, cotangent),
                _last_layer_gradient(net, state, features, gan_cotangent),
            )
        cotangent = cotangent + weight * gan_cotangent
        values |= {"gan_generator": metrics.mean(gan_loss), "gan_weight": metrics.mean(weight)}

    (grads,) = pullback((cotangent, jnp.ones_like(quantizer_loss)))
    params, opt, norm = _update(setup, state, "generator", grads)
    codebook, stats, revived_K = quantizers.revive(
        setup.model.quantizer, params["quantize"]["embedding"], stats, quantized.z, key
    )
    params = {**params, "quantize": {"embedding": codebook}}
    values |= {
        "gradient_norm": metrics.mean(norm),
        "codebook_usage": metrics.used_share(quantized.counts_K),
        "code_entropy_bits": metrics.entropy(quantized.counts_K),
        "revived_codes": metrics.mean(revived_K.sum()),
    }
    trainable, opts = {**state.trainable, "generator": params}, {**state.opt, "generator": opt}

    # --- Discriminator step on the same reconstructions; real and fake go through in separate calls.
    if adversarial:
        fake_BHWC = jax.lax.stop_gradient(recon_BHWC)
        d_loss, d_grads = jax.value_and_grad(
            lambda p: discriminator_loss(critic(p, images_BHWC), critic(p, fake_BHWC))
        )(state.trainable["discriminator"])
        trainable["discriminator"], opts["discriminator"], _ = _update(setup, state, "discriminator", d_grads)
        values["gan_discriminator"] = metrics.mean(d_loss)

    ema = dict(state.ema)
    if "generator" in ema:
        ema["generator"] = optim.update_ema(ema["generator"], params, setup.config.ema_decay, state.step)
        # The average of a code before and after its revival is neither.
        average = ema["generator"]["quantize"]["embedding"]
        ema["generator"]["quantize"]["embedding"] = jnp.where(revived_K[:, None], codebook, average)
    state = dataclasses.replace(
        state, step=state.step + 1, trainable=trainable, opt=opts, ema=ema, stats={"quantizer": stats}
    )
    return state, values


def _psnr(x_BHWC: jax.Array, target_BHWC: jax.Array) -> jax.Array:
    """Per-image PSNR in dB of images in [-1, 1], clipped to that range."""
    mse_B = jnp.mean(jnp.square(jnp.clip(x_BHWC, -1, 1) - target_BHWC), axis=(1, 2, 3))
    return 10 * jnp.log10(4.0 / jnp.maximum(mse_B, 1e-10))


def _critic(setup: Setup, state: TrainState) -> Callable[[state_lib.Params, jax.Array], jax.Array]:
    net, frozen = setup.networks["discriminator"], state.frozen["discriminator"]

    def logits(params: state_lib.Params, images_BHWC: jax.Array) -> jax.Array:
        module: Any = net.module(state_lib.join(params, frozen))
        return module(images_BHWC)

    return logits


def _last_layer_gradient(net: Network, state: TrainState, features: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Gradient of a loss with respect to the last layer's kernel, from its cotangent at the image."""
    params = jax.lax.stop_gradient(state.params("generator"))

    def pixels(kernel: jax.Array) -> jax.Array:
        model: Any = net.module(params)
        model.decoder.conv_out.kernel[...] = kernel
        return model.to_pixels(jax.lax.stop_gradient(features))

    module: Any = net.module(params)
    _, pull = jax.vjp(pixels, module.decoder.conv_out.kernel[...])
    return pull(cotangent)[0]


def _update(setup: Setup, state: TrainState, name: str, grads: state_lib.Params) -> tuple[Any, Any, jax.Array]:
    updates, opt = setup.optimizers[name].update(grads, state.opt[name], state.trainable[name])
    return optax.apply_updates(state.trainable[name], updates), opt, optax.global_norm(grads)


def predict_fns(setup: Setup) -> dict[str, Callable[..., Any]]:
    """Pure functions of (parameters of "generator", input): "reconstruct", "encode", "decode"."""
    net = setup.networks["generator"]

    def reconstruct(params: state_lib.Params, images_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        model: Any = net.module(params)
        codes_Bhw = model.encode_codes(images_BHWC)
        return model.decode_codes(codes_Bhw), codes_Bhw

    def encode(params: state_lib.Params, images_BHWC: jax.Array) -> jax.Array:
        model: Any = net.module(params)
        return model.encode_codes(images_BHWC)

    def decode(params: state_lib.Params, codes_Bhw: jax.Array) -> jax.Array:
        model: Any = net.module(params)
        return model.decode_codes(codes_Bhw)

    return {"reconstruct": reconstruct, "encode": encode, "decode": decode}


def evaluate(setup: Setup, state: TrainState, mesh: Mesh) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Scores the validation split; also returns a grid of inputs over reconstructions for TensorBoard."""
    config = setup.config
    rows = sharding.host_rows(mesh, config.eval_batch_size)
    scores, grid = reconstruction.evaluate(
        _predict(setup, "reconstruct"),
        state.eval_params("generator"),
        batches(setup, "validation", batch_size=config.eval_batch_size, rows=rows),
        setup.model.quantizer.num_codes,
        mesh,
    )
    return {f"validation/{name}": value for name, value in scores.items()}, {"validation/reconstructions": grid[None]}


@functools.cache
def _predict(setup: Setup, name: str) -> Callable[..., Any]:
    """The same function object every time, with which evaluations keep their compiled program."""
    return predict_fns(setup)[name]
