"""Scores of reconstructions and of samples within training: the same numbers as from files."""

import functools
import gc
import os
import pathlib
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax import config as config_lib
from imagegpt_jax.data import pipeline
from imagegpt_jax.errors import UserError
from imagegpt_jax.images import to_uint8
from imagegpt_jax.metrics import captions, frechet, kernels, networks, protocols, reconstruction, statistics
from imagegpt_jax.metrics.features import Network
from imagegpt_jax.parallel import sharding
from imagegpt_jax.sampling.batching import run
from imagegpt_jax.sampling.jobs import image_job
from imagegpt_jax.sampling.settings import Sampling
from imagegpt_jax.tasks import decoder, tokenizer
from imagegpt_jax.tasks.decoder import evaluation
from imagegpt_jax.tasks.decoder.setup import tokenizer_params

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def network(name):
    """Features that are means of the four quarters, of three channels."""

    def apply(params, images):
        B, H, W, C = images.shape
        quarters = images.reshape(B, 2, H // 2, 2, W // 2, C).mean(axis=(2, 4)).reshape(B, -1)
        return {"pool": jnp.square(quarters / 255) * params}

    return Network(name, {}, np.asarray, apply, np.float32(2.0))


def reconstruct(params, images_BHWC):
    """Reconstructions are half as contrasted; all codes are zero."""
    return images_BHWC * params, jnp.zeros((len(images_BHWC), 2, 2), jnp.int32)


ON_MESHES = "tests_on_eight_devices"  # in the environment of the process that has them


def test_the_same_on_eight_devices():
    """Tests of meshes again, in a process with as many devices as they ask for."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "8 or samples_are"]
    ran = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flags, ON_MESHES: "1"}, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.startswith("..")


def devices_of(count):
    if ON_MESHES in os.environ:
        assert len(jax.devices()) == 8
    return jax.devices()[:count]


@pytest.mark.parametrize(("name", "devices"), [("inception", 1), ("inception", 8), ("other", 2)])
def test_scores_on_a_mesh(name, devices):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3))
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, devices_of(devices))
    batches = []
    for start in range(0, 30, 16):
        part = images[start : start + 16] / 127.5 - 1
        mask = np.arange(16) < len(part)
        part = np.concatenate([part, np.full((16 - len(part), 8, 8, 3), 0.9)])
        batches.append({"image": part.astype(np.float32), "mask": mask})
    with jax.set_mesh(mesh):
        evaluator = reconstruction.ReconstructionEvaluator(
            reconstruct, lambda: batches, 4, mesh, network=network(name), prefix="validation/"
        )
        named = evaluator.evaluate({"generator": np.float32(0.5)}, 0).scores
    scores = {key.removeprefix("validation/"): value for key, value in named.items()}
    assert ("rfid" in scores) == (name == "inception")
    fake = np.round((images / 127.5 - 1) * 0.5 * 127.5 + 127.5)
    rows, gaussians = [], []
    for pictures in (images, fake):
        features = np.asarray(network(name).apply(2.0, jnp.asarray(pictures, jnp.float32))["pool"])
        rows.append(statistics.Rows(12))
        rows[-1].add(features)
        moments = statistics.Moments(12)
        moments.add(features)
        gaussians.append(frechet.Gaussian.of(moments))
    assert scores["kid"] == pytest.approx(kernels.kid(rows[1], rows[0], protocols.find("emoji").kid).mean(), rel=1e-5)
    if name == "inception":
        assert scores["rfid"] == pytest.approx(frechet.distance(*gaussians), rel=1e-5)
    assert scores["images"] == 30


# ---------------------------------------------------------------------------------------------------------- decoders


@pytest.mark.skipif(ON_MESHES not in os.environ, reason="run by test_the_same_on_eight_devices")
def test_samples_are_scored_on_the_mesh_like_a_folder(monkeypatch):
    """KID of colours, and CLIPScore, of the pictures that plain sampling draws on one device."""
    monkeypatch.setattr(networks, "LOADERS", {"efficientnet_lite0": colours, "clip": colours})
    monkeypatch.setattr(networks, "embed_texts", lambda path, texts: np.array([[len(t), 9, 1] for t in texts], float))
    changes = {"eval_samples": 6, "eval_features": "efficientnet_lite0,clip=configs", "sample_prompts": ()}
    setup = decoder.setup(config_of("decoder", **changes))
    state = jax.jit(functools.partial(decoder.init_state, setup))(jax.random.key(0))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1}, devices_of(8))
    with jax.set_mesh(mesh):
        state = jax.device_put(state, sharding.replicated(mesh))
        likelihoods, evaluator = decoder.TASK.evaluators(setup, mesh)
        params = {name: state.eval_params(name) for name in setup.networks}
        assert "validation/loss" in likelihoods.evaluate(params, 0).scores
        scores = evaluator.evaluate(params, 0).scores
    assert set(scores) == {"validation/samples_kid", "validation/samples_clip_score"}

    texts, labels, shown = evaluation._validation_prompts(setup)
    assert (len(texts), labels, shown) == (6, None, texts)
    assert len(set(texts)) == 6
    sampling = Sampling(**setup.config.sampling.to_dict())
    module = setup.networks["decoder"].module(state.params("decoder"))
    job = image_job(setup.layout, [(setup.text.encode_batch(texts), None)], sampling)
    codes = run(module, job, sampling).tokens
    tokenizer = setup.tokenizer.networks["generator"].module(tokenizer_params(setup))
    pictures = to_uint8(
        np.asarray(jax.jit(type(tokenizer).decode_codes)(tokenizer, codes.reshape(-1, *setup.layout.grid)))
    )
    source = setup.sources["validation"]
    batches = pipeline.Batches(source, batch_size=len(source), shuffle=False, epochs=1, columns=("image",))
    real = to_uint8(next(batches)["image"])
    batches.close()
    rows = []
    for images in (pictures, real):
        rows.append(statistics.Rows(3))
        rows[-1].add(np.asarray(means(np.float32(1), images)["pool"]))
    expected = kernels.kid(rows[0], rows[1], protocols.find("emoji").kid).mean()
    assert scores["validation/samples_kid"] == pytest.approx(expected, rel=1e-5)
    embeddings = np.array([[len(t), 9, 1] for t in texts])
    expected = captions.clip_scores(rows[0].block(0, 6), embeddings).mean()
    assert scores["validation/samples_clip_score"] == pytest.approx(expected, rel=1e-5)

    # Nothing outlives a run: neither its setup, nor parameters, nor those of the image tokenizer.
    held = [setup, evaluator._draw, *jax.tree.leaves((params, state))]
    kept = [weakref.ref(thing) for thing in held]
    del setup, state, params, module, evaluator, likelihoods, held, source, tokenizer
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == []


def means(params, images):
    features = images.astype(jnp.float32).mean(axis=(1, 2)) / 64 * params
    return {"pool": features, "embedding": features}


def colours(path, resize):
    name = "clip" if path else "efficientnet_lite0"
    return Network(name, {}, np.asarray, means, np.float32(1))


def config_of(task, **changes):
    config = config_lib.sibling(str(CONFIGS / "x.py"), f"{task}.py").get_config("size=test")
    config.data.train = config.data.validation = "emoji:validation,res=16,styles=noto"
    for key, value in changes.items():
        config.update_from_flattened_dict({key: value})
    return config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_samples": 1}, "give 2 or more"),
        ({"eval_samples": 4, "eval_features": ""}, "eval_features is empty"),
        ({"eval_samples": 4, "eval_features": "inseption"}, "Did you mean 'inception'"),
        ({"eval_samples": 4, "eval_features": "clip"}, "clip needs weights"),
        ({"eval_samples": 4, "eval_features": "inception=/no/such.pth"}, "no weights of inception at /no/such.pth"),
    ],
)
def test_scores_of_samples_that_cannot_be_computed_are_refused_before_training(changes, words):
    with pytest.raises(UserError, match=words):
        decoder.setup(config_of("decoder", **changes))


def test_features_of_reconstructions_are_looked_for_before_training():
    with pytest.raises(UserError, match=r"no weights of inception at /no/such.pth"):
        tokenizer.setup(config_of("tokenizer", eval_features="inception=/no/such.pth"))
