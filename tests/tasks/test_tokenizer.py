"""The tokenizer's step against its definition, written out with plain gradients."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from imagegpt_jax import config as config_lib
from imagegpt_jax import train_state
from imagegpt_jax.errors import UserError
from imagegpt_jax.losses import basic
from imagegpt_jax.models import flops, logit_laplace
from imagegpt_jax.tasks import tokenizer
from imagegpt_jax.training import step_guard

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def make(**changes):
    config = config_lib.sibling(str(CONFIGS / "x.py"), "tokenizer.py").get_config("size=test")
    config.model.quantizer.revival_steps = 0  # so that an update is the optimizer's alone
    for which in ("optim", "discriminator_optim"):
        config[which].update({"name": "sgd", "b1": 0.0, "lr": 1.0, "clip_norm": 0.0, "schedule": "constant"})
    for key, value in changes.items():
        with config.unlocked():
            config.update_from_flattened_dict({key: value})
    return config, tokenizer.setup(config)


IMAGES = jax.random.uniform(jax.random.key(7), (4, 16, 16, 3), minval=-1, maxval=1)


def step(setup, phase):
    """State before and after one step, and its metrics."""
    made = jax.jit(lambda key: tokenizer.init_state(setup, key))(jax.random.key(0))
    after, values = jax.jit(lambda s, b: tokenizer.train_step(setup, phase, s, b))(made, {"image": IMAGES})
    return made, after, values


def updates(setup, phase):
    made, after, values = step(setup, phase)
    return made, jax.tree.map(lambda a, b: a - b, made.trainable, after.trainable), values


def generator_loss(setup, made, params, weight):
    model = setup.networks["generator"].module(params)
    recon, quantized = model.reconstruct(IMAGES)
    loss = basic.l2(recon, IMAGES) + quantized.loss
    if weight is not None:
        critic = setup.networks["discriminator"].module(made.trainable["discriminator"])
        loss = loss + weight * basic.hinge_generator(critic(recon))
    return loss


def assert_trees_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), a, b)


def test_reconstruction_phase_is_the_gradient_of_its_loss():
    _, setup = make()
    made, update, values = updates(setup, "reconstruction")
    expected = jax.jit(jax.grad(lambda p: generator_loss(setup, made, p, None)))(made.trainable["generator"])
    assert_trees_close(update["generator"], expected)
    assert not any(np.abs(x).max() for x in jax.tree.leaves(update["discriminator"]))
    assert "gan_generator" not in values


def test_adversarial_phase_is_the_gradient_of_the_combined_loss():
    """One backward pass on the combined cotangent equals the gradient of the sum."""
    _, setup = make(**{"loss.adaptive": False, "loss.gan": 0.5})
    made, update, _ = updates(setup, "adversarial")
    expected = jax.jit(jax.grad(lambda p: generator_loss(setup, made, p, 0.5)))(made.trainable["generator"])
    assert_trees_close(update["generator"], expected)
    without = jax.jit(jax.grad(lambda p: generator_loss(setup, made, p, None)))(made.trainable["generator"])
    with pytest.raises(AssertionError):
        assert_trees_close(update["generator"], without)


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    _, setup = make(**{"loss.adaptive": True, "loss.gan": 0.5})
    made, update, values = updates(setup, "adversarial")
    params = made.trainable["generator"]

    def at_last_layer(loss):
        return jax.jit(jax.grad(loss))(params)["decoder"]["conv_out"]["kernel"]

    def adversarial(p):
        return generator_loss(setup, made, p, 1.0) - generator_loss(setup, made, p, None)

    ratio = optax.global_norm(at_last_layer(lambda p: generator_loss(setup, made, p, None))) / (
        optax.global_norm(at_last_layer(adversarial)) + 1e-4
    )
    np.testing.assert_allclose(values["gan_weight"].compute(), 0.5 * ratio, rtol=1e-3)
    expected = jax.jit(jax.grad(lambda p: generator_loss(setup, made, p, 0.5 * ratio)))(params)
    assert_trees_close(update["generator"], expected)


def test_discriminator_sees_real_and_fake_apart():
    _, setup = make(**{"loss.adaptive": False})
    made, update, values = updates(setup, "adversarial")
    model = setup.networks["generator"].module(made.trainable["generator"])
    fake, _ = model.reconstruct(IMAGES)

    def loss(params):
        critic = setup.networks["discriminator"].module(params)
        return basic.hinge_discriminator(critic(IMAGES), critic(fake))

    value, expected = jax.value_and_grad(loss)(made.trainable["discriminator"])
    np.testing.assert_allclose(values["gan_discriminator"].compute(), value, rtol=1e-5)
    np.testing.assert_allclose(values["discriminator_gradient_norm"].compute(), optax.global_norm(expected), rtol=1e-4)
    assert_trees_close(update["discriminator"], expected)


@pytest.mark.parametrize("first", [False, True])
def test_the_guard_sees_a_gradient_of_the_discriminator_that_is_not_finite(first, monkeypatch):
    """As of an R1 penalty that overflows: the losses that are told are finite."""
    config, setup = make(**{"loss.discriminator_first": first})
    made = jax.eval_shape(lambda key: tokenizer.init_state(setup, key), jax.random.key(0))
    made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)

    @jax.jit
    def judged(slope):
        def differentiated(function, images, parts):
            shapes = jax.eval_shape(function, images)
            sums, *rest = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
            if "discriminator" in sums.gradients:
                critic = jax.tree.map(lambda x: x * slope, sums.gradients["discriminator"])
                sums = sums._replace(gradients={**sums.gradients, "discriminator": critic})
            return sums, *rest

        monkeypatch.setattr(tokenizer, "accumulate", differentiated)
        after, values = tokenizer.train_step(setup, "adversarial", made, {"image": IMAGES})
        finite = tokenizer.TASK.finite_metrics
        good, _ = step_guard.judge(config.guard, made.guard["adversarial"], made.step, values, finite)
        return good, jax.tree.leaves(after.trainable["discriminator"])

    for slope in (1.0, np.nan):
        good, parameters = judged(slope)
        assert good == all(np.isfinite(x).all() for x in parameters) == np.isfinite(slope)


def test_logit_laplace_is_the_likelihood_of_what_the_decoder_gives():
    _, setup = make(**{"model.logit_laplace": True, "loss.logit_laplace": 0.5, "loss.l2": 0.3, "loss.gan_start": -1})
    made, update, values = updates(setup, "reconstruction")

    def loss(params):
        model = setup.networks["generator"].module(params)
        quantized = model.quantize(model.encode(IMAGES))
        output = model.output(model.decode_features(quantized.zq))
        assert output.shape == (4, 16, 16, 6)
        nll = basic.logit_laplace(output[..., :3], output[..., 3:], IMAGES)
        recon = logit_laplace.pixels(output[..., :3])
        return 0.5 * nll + 0.3 * basic.l2(recon, IMAGES) + quantized.loss, (nll, recon)

    expected, (nll, recon) = jax.jit(jax.grad(loss, has_aux=True))(made.trainable["generator"])
    assert_trees_close(update["generator"], expected)
    np.testing.assert_allclose(values["logit_laplace"].compute(), nll, rtol=1e-5)
    shown = tokenizer.predict_fns(setup)["reconstruct"](made.params("generator"), IMAGES)[0]
    np.testing.assert_allclose(shown, recon, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="go together"):
        make(**{"loss.logit_laplace": 0.5})


def test_phases_follow_the_start_step():
    _, setup = make(**{"loss.gan_start": 3})
    assert [tokenizer.phase(setup, s) for s in (0, 2, 3, 9)] == ["reconstruction"] * 2 + ["adversarial"] * 2
    _, setup = make(**{"loss.gan_start": -1})
    assert tokenizer.phase(setup, 10**9) == "reconstruction"
    assert "discriminator" not in setup.networks


def test_first_step_sets_the_codebook_from_the_data():
    config, _ = make()
    config.model.quantizer.revival_steps = 8
    setup = tokenizer.setup(config)
    _, after, values = step(setup, "reconstruction")
    assert values["revived_codes"].compute() == config.model.quantizer.num_codes
    codebook = after.trainable["generator"]["quantize"]["embedding"]
    np.testing.assert_array_equal(codebook, after.ema["generator"]["quantize"]["embedding"])


def test_frozen_parts_do_not_move():
    config, _ = make()
    config.frozen = ("^encoder/",)
    setup = tokenizer.setup(config)
    made, update, _ = updates(setup, "reconstruction")
    assert "encoder" not in made.trainable["generator"]
    assert set(made.frozen["generator"]) == {"encoder"}
    assert any(np.abs(x).max() for x in jax.tree.leaves(update["generator"]["decoder"]))
    assert train_state.count_params(made.params("generator")) == train_state.count_params(
        dataclasses.replace(made, ema={}).eval_params("generator")
    )


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor", "shampoo"])
def test_every_optimizer_trains_what_is_not_frozen(name):
    changes = {"frozen": ("^encoder/", "^convs/1/"), "optim.name": name, "discriminator_optim.name": name}
    _, setup = make(**changes)
    made = jax.eval_shape(lambda key: tokenizer.init_state(setup, key), jax.random.key(0))
    for network, optimizer in setup.optimizers.items():
        assert train_state.count_params(made.frozen[network])
        params = made.trainable[network]
        updates, _ = jax.eval_shape(optimizer.update, params, made.opt[network], params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_average_lags_behind():
    _, setup = make(**{"ema_decay": 0.9})
    made, after, _ = step(setup, "reconstruction")
    kernel = lambda tree: tree["generator"]["decoder"]["conv_out"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(
        kernel(after.ema), kernel(made.ema) + 0.9 * (kernel(after.trainable) - kernel(made.ema)), rtol=1e-4, atol=1e-7
    )
    assert jnp.abs(kernel(after.ema) - kernel(after.trainable)).max() > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_accumulated_parts_make_the_step_of_the_whole_batch(dtype, tolerance):
    changes = {"model.dtype": dtype, "model.param_dtype": dtype, "model.quantizer.revival_steps": 8}
    with jax.enable_x64(dtype == "float64"):
        whole, parts = (
            step(make(batch_size=4, accumulate=count, **changes)[1], "reconstruction")[1:] for count in (1, 2)
        )
        for name in ("trainable", "ema", "stats"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
                getattr(whole[0], name),
                getattr(parts[0], name),
            )
        for name in whole[1]:
            np.testing.assert_allclose(whole[1][name].compute(), parts[1][name].compute(), rtol=tolerance)
        assert jax.tree.leaves(whole[0].trainable["generator"])[0].dtype == dtype


def test_float64_is_refused_where_jax_keeps_to_32_bits():
    for key in ("model.dtype", "model.param_dtype", "discriminator.dtype"):
        with pytest.raises(UserError, match="JAX_ENABLE_X64=1"):
            make(**{key: "float64"})


def test_perceptual_weights_are_state_and_no_constants(tmp_path):
    from imagegpt_jax.models.pretrained.lpips import LPIPS

    path = tmp_path / "lpips.safetensors"
    network = LPIPS("vgg16", key=jax.random.key(3))
    safetensors.numpy.save_file({name: np.asarray(p[...]) for name, p in network.parameters().items()}, path)
    _, setup = make(**{"loss.lpips": 0.5, "loss.lpips_weights": str(path)})
    shapes = jax.eval_shape(lambda key: tokenizer.init_state(setup, key), jax.random.key(0))
    assert train_state.count_params(shapes.trainable["perceptual"]) == 0
    drawn = jax.tree.map(lambda x: 0.1 * jnp.ones(x.shape, x.dtype), shapes)
    everywhere = jax.tree.map(lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    made = tokenizer.load_frozen(setup, drawn, everywhere)
    np.testing.assert_array_equal(made.frozen["perceptual"]["convs"][0]["kernel"], network.convs[0].kernel[...])
    traced = jax.make_jaxpr(lambda s, b: tokenizer.train_step(setup, "reconstruction", s, b))(made, {"image": IMAGES})
    assert max((np.size(c) for c in traced.consts), default=0) < 1000


@pytest.mark.parametrize("phase", ["reconstruction", "adversarial"])
def test_flops_are_the_model_s_and_no_optimizer_s(phase):
    """Products of Muon's and Shampoo's matrices are made once a step, and a batch has as many as it has images."""

    def count(name):
        config, _ = make(**{"optim.name": name, "discriminator_optim.name": name, "optim.b1": 0.9})
        setup = tokenizer.setup_abstract(config)
        return tokenizer.step_flops(setup, phase, tokenizer.abstract_batch(setup, 4))

    _, setup = make()
    made = jax.eval_shape(lambda key: tokenizer.init_state(setup, key), jax.random.key(0))
    plain = flops.traced(functools.partial(tokenizer.train_step, setup, phase), made, {"image": IMAGES})
    assert [count(name) for name in ("adam", "muon", "shampoo")] == [plain] * 3


# ------------------------------------------------------------------------------------- the discriminator's choices


def critic_loss(setup, made, fake, params):
    """Hinge, LeCam (averages at zero, as at the start) and R1 written out."""

    def judge(images):
        return setup.networks["discriminator"].module(params)(images)

    real, fake = judge(IMAGES), judge(fake)
    slope = jax.grad(lambda images: judge(images).sum())(IMAGES)
    lecam = jnp.mean(jax.nn.relu(real) ** 2) + jnp.mean(jax.nn.relu(-fake) ** 2)
    r1 = 0.5 * jnp.mean(jnp.sum(slope**2, axis=(1, 2, 3)))
    return basic.hinge_discriminator(real, fake) + setup.loss.lecam * lecam + setup.loss.r1 * r1, (real, fake)


def test_discriminator_first_with_lecam_and_r1():
    """Its update is that of its loss; the generator is judged by the updated one; averages follow the logits."""
    _, setup = make(
        **{
            "loss.adaptive": False,
            "loss.gan": 0.5,
            "loss.gan_kind": "non_saturating_hinge",
            "loss.discriminator_first": True,
            "loss.lecam": 0.3,
            "loss.lecam_decay": 0.9,
            "loss.r1": 0.7,
            "discriminator.norm": "none",
        }
    )
    made, after, values = step(setup, "adversarial")
    fake = setup.networks["generator"].module(made.trainable["generator"]).reconstruct(IMAGES)[0]
    critic = made.trainable["discriminator"]
    expected, (real, judged) = jax.jit(jax.grad(lambda p: critic_loss(setup, made, fake, p), has_aux=True))(critic)
    updated = jax.tree.map(lambda p, g: p - g, critic, expected)
    assert_trees_close(after.trainable["discriminator"], updated)
    assert float(values["r1"].compute()) > 0
    np.testing.assert_allclose(after.stats["logits"].real, 0.1 * real.mean(), rtol=1e-4)
    np.testing.assert_allclose(after.stats["logits"].fake, 0.1 * judged.mean(), rtol=1e-4)

    def generator(params):
        model = setup.networks["generator"].module(params)
        recon, quantized = model.reconstruct(IMAGES)
        logits = setup.networks["discriminator"].module(updated)(recon)
        return basic.l2(recon, IMAGES) + quantized.loss + 0.5 * basic.nonsaturating_generator(logits)

    gradient = jax.jit(jax.grad(generator))(made.trainable["generator"])
    update = jax.tree.map(lambda a, b: a - b, made.trainable["generator"], after.trainable["generator"])
    assert_trees_close(update, gradient)


def test_averages_of_logits_exist_only_for_lecam():
    assert set(jax.eval_shape(lambda: tokenizer.init_state(make()[1], jax.random.key(0))).stats) == {"quantizer"}


QUANTIZERS = {
    "fsq": {"kind": "fsq", "levels": (4, 4, 4), "code_dim": 3},
    "lfq": {"kind": "lfq", "code_dim": 6, "entropy_weight": 0.1},
    "ibq": {"kind": "ibq", "index_weight": 1.0, "entropy_weight": 0.1},
    "averages": {"codebook_update": "ema", "groups": 2, "depth": 2},
}


def make_quantizer(kind):
    config, _ = make()
    config.model.quantizer.update({"l2_normalize": False, **QUANTIZERS[kind]})
    return tokenizer.setup(config)


@pytest.mark.parametrize("kind", ["fsq", "averages"])
def test_quantizers_train(kind):
    setup = make_quantizer(kind)
    made, after, values = step(setup, "reconstruction")
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), made.trainable["generator"], after.trainable["generator"])
    assert moved["encoder"]["conv_in"]["kernel"] > 0
    assert ("quantize" in moved) == (kind == "averages")
    assert kind == "fsq" or moved["quantize"]["embedding"] > 0
    total = 0.01 * IMAGES.shape[0] * 16 * setup.model.quantizer.codes_per_vector
    np.testing.assert_allclose(after.stats["quantizer"].average_I.sum(), total, rtol=1e-5)
    assert 0 < float(values["codebook_usage"].compute()) <= 1


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_quantizer_keeps_the_shape_of_the_state(kind):
    setup = make_quantizer(kind)
    made = jax.eval_shape(lambda key: tokenizer.init_state(setup, key), jax.random.key(0))
    after, _ = jax.eval_shape(lambda s, b: tokenizer.train_step(setup, "adversarial", s, b), made, {"image": IMAGES})
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), made)
    codes = jax.eval_shape(tokenizer.predict_fns(setup)["encode"], made.params("generator"), IMAGES)
    assert codes.shape == (4, 4, 4 * setup.model.quantizer.codes_per_vector)
