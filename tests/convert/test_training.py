"""Published weights in training: as the image tokenizer, as a warm start, as a text encoder."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import imagegpt_jax as ig
from imagegpt_jax import config as config_lib
from imagegpt_jax import train_state
from imagegpt_jax.data import text as text_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import export
from imagegpt_jax.models.gpt import GPT, Sequence
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.runtime import event_log
from imagegpt_jax.tasks import decoder as decoder_task
from imagegpt_jax.tasks.decoder.setup import tokenizer_params
from imagegpt_jax.training import warm_start

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "weights"
# The network that weights go into, and their kind.
INTO = ("decoder", "decoder")
# GPT-2's shape, with room for more ids and longer sequences.
MODEL = {"vocab_size": 30, "width": 16, "depth": 2, "heads": 2, "mlp_width": 64, "norm": "layer", "mlp": "gelu",
         "bias": True, "attention_scale_by_layer": True, "position": "learned", "max_length": 20,
         "tie_embeddings": True}  # fmt: skip


@pytest.mark.parametrize("form", ["published", "portable"])
def test_a_decoder_is_trained_over_a_published_tokenizer(form, tmp_path):
    path = GOLDEN / "janus"
    if form == "portable":
        export.convert(path, tmp_path / "portable")
        path = tmp_path / "portable"
    config = config_lib.sibling(str(ROOT / "configs/x.py"), "decoder.py").get_config("size=test")
    config.tokenizer = str(path)
    config.data.grid = (4, 4)
    setup = decoder_task.setup_abstract(config)
    assert setup.space.num_codes == 16
    params = tokenizer_params(setup)
    network = setup.tokenizer.networks["generator"].module(params)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    codes = ig.load_tokenizer(path, batch_size=1).encode(images)
    np.testing.assert_array_equal(network.encode_codes(images).reshape(1, -1), codes)


def test_two_processes_read_weights_in_half_precision_and_share_out_samples(tmp_path):
    """The image tokenizer, the text encoder and the warm start of a decoder as `training.loop.run` has them read, and
    rows of samples as its evaluations draw them: under a mesh of devices that are not all of this process."""
    folder = tmp_path / "gpt2"
    shutil.copytree(GOLDEN / "gpt2", folder)
    whole = safetensors.numpy.load_file(folder / "model.safetensors")
    half = {name: x.astype(np.float16) for name, x in whole.items()}
    safetensors.numpy.save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    text_lib.TextTokenizer(words).save(folder)
    code = """
        import sys
        import jax, numpy as np
        port, index, tokenizer, encoder = sys.argv[1:]
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))

        from imagegpt_jax import config
        from imagegpt_jax.runtime import event_log
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax import train_state
        from imagegpt_jax.training import warm_start
        from imagegpt_jax.convert import reading
        from imagegpt_jax.data.packing import Layout
        from imagegpt_jax.data.packing import TokenSpace
        from imagegpt_jax.metrics import features
        from imagegpt_jax.metrics import sets
        from imagegpt_jax.metrics.common import to_host
        from imagegpt_jax.sampling.settings import Sampling
        from imagegpt_jax.sampling.jobs import image_job
        from imagegpt_jax.models import gpt
        from imagegpt_jax.models.gpt_config import GPTConfig
        from imagegpt_jax.sampling import batching
        from imagegpt_jax.tasks.decoder import evaluation
        from imagegpt_jax.tasks.decoder.setup import encoder_params, setup_abstract, tokenizer_params

        made = config.sibling("configs/x.py", "decoder.py").get_config("size=test")
        made.update({"tokenizer": tokenizer, "text_encoder": encoder})
        made.data.update({"grid": (4, 4), "text_length": 4})
        setup = setup_abstract(made)
        nets = {tokenizer_params: setup.tokenizer.networks["generator"],
                encoder_params: setup.encoder.network}
        mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 1})
        with jax.set_mesh(mesh):
            for read, net in nets.items():
                specs, is_spec = sharding.module_specs(net.abstract, mesh), lambda x: isinstance(x, jax.P)
                layout = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs, is_leaf=is_spec)
                params = read(setup, layout)
                assert jax.tree.map(lambda x: x.sharding, params) == layout
                kinds = jax.tree.map(lambda x: x.dtype, train_state.split(net.abstract)[1])
                assert jax.tree.map(lambda x: x.dtype, params) == kinds
                here = read(setup)
                jax.tree.map(np.testing.assert_array_equal, to_host(params), here)
            for x in jax.tree.leaves(evaluation._CodesToImages(setup, mesh)._params):
                assert x.is_fully_replicated and len(x.sharding.device_set) == 2

        net = train_state.network(lambda key: gpt.GPT(GPTConfig(**MODEL), key=key))
        whole = train_state.split(net.construct(jax.random.key(0)))[1]
        params = sharding.put_whole(whole, jax.tree.map(lambda _: sharding.replicated(mesh), whole))
        fields = dict(trainable={"decoder": params}, frozen={"decoder": {}}, opt={"decoder": ()}, ema={}, stats={})
        begun = train_state.TrainState(step=jax.numpy.zeros((), jax.numpy.int32), **fields)
        with jax.set_mesh(mesh):
            warm = config.ConfigDict({"init_from": encoder, "init_partial": False})
            warmed = warm_start.load_params(begun, warm, ("decoder", "decoder"), event_log.Log(None))
        expected = np.asarray(reading.load(encoder, "decoder").params["embed"]["weight"]).astype(np.float32)
        np.testing.assert_array_equal(to_host(warmed.trainable["decoder"])["embed"]["weight"][:len(expected)], expected)

        layout = Layout(space=TokenSpace(text_vocab=8, num_classes=0, num_codes=16), text_length=2, grid=(2, 2))
        texts = [[1], [2], [3], [4]]
        with jax.set_mesh(mesh):
            keys, job = batching.sample_keys(1, np.arange(4)), image_job(layout, [(texts, None)], Sampling())
            rows = batching.rows_of(job, keys, np.arange(4).reshape(2, 2), mesh)
            scale = jax.jit(lambda: jax.numpy.ones(3), out_shardings=sharding.replicated(mesh))()
            mean = features.Network("mean", {}, np.asarray, lambda scale, x: {"pool": x.mean((1, 2)) * scale}, scale)
            held = sets.InMemory("held", np.arange(36, dtype=np.uint8).reshape(3, 2, 2, 3))
            (part,) = features.extract(held, [mean], [("mean", "pool")])
        np.testing.assert_allclose(part.features["mean", "pool"][:, 0], [4.5, 16.5, 28.5])
        assert {x.sharding for x in jax.tree.leaves(rows)} == {sharding.batch_sharding(mesh)}
        np.testing.assert_array_equal(to_host(rows.prompt.tokens), layout.prompt(texts)["tokens"])
        print("ok")
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    two = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"MODEL = {MODEL}\n{textwrap.dedent(code)}",
                str(port),
                str(i),
                str(GOLDEN / "janus"),
                str(folder),
            ],
            cwd=ROOT,
            env=alone
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "XLA_FLAGS": "--xla_backend_optimization_level=0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in two:
            output, error = process.communicate(timeout=120)
            assert output.endswith("ok\n"), error
    finally:
        for process in two:
            process.kill()


# -------------------------------------------------------------------------------------------------------- warm start


def begin(model, **settings):
    """The state of a decoder's run after its warm start."""
    net = train_state.network(lambda key: GPT(GPTConfig(**model), key=key))
    params = train_state.split(net.construct(jax.random.key(0)))[1]
    state = train_state.TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable={"decoder": params},
        frozen={"decoder": {}},
        opt={"decoder": ()},
        ema={},
        stats={},
    )
    config = config_lib.ConfigDict({"init_from": str(GOLDEN / "gpt2"), "init_partial": False, **settings})
    return (
        net,
        params,
        warm_start.load_params(state, config, INTO, event_log.Log(None)).trainable["decoder"],
    )


def test_gpt2_is_a_warm_start_for_the_words_of_a_decoder():
    net, before, after = begin(MODEL)
    ids = np.arange(22).reshape(2, 11) % 16
    words = net.module(after).logits(jnp.asarray(ids))[..., :17]
    expected = ig.load_decoder(GOLDEN / "gpt2").logits(ids)
    np.testing.assert_allclose(words, expected, atol=1e-5 * np.abs(expected).max())
    # Rows of ids that GPT-2 does not know keep what they were drawn with.
    np.testing.assert_array_equal(after["embed"]["weight"][17:], before["embed"]["weight"][17:])
    assert not np.array_equal(after["embed"]["weight"][:17], before["embed"]["weight"][:17])


def test_what_does_not_fit_is_listed_or_left(capsys):
    with pytest.raises(UserError, match=r"decoder/blocks/attention/query_norm/scale: not in .*init_partial=True"):
        begin({**MODEL, "qk_norm": True})
    _, before, after = begin({**MODEL, "mlp_width": 48}, init_partial=True)
    np.testing.assert_array_equal(*(p["blocks"]["mlp"]["up"]["weight"] for p in (before, after)))
    assert not np.array_equal(*(p["blocks"]["attention"]["out"]["weight"] for p in (before, after)))
    assert "decoder/blocks/mlp/up/weight: (2, 16, 48) here, (2, 16, 64) there" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ text encoder


@pytest.fixture
def encoder(tmp_path):
    """A GPT-2 with a tokenizer of words beside its weights."""
    words = {word: i for i, word in enumerate(["a", "red", "blue", "green", "bicycle", "of", "on", "the", "boat"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({**words, "[UNK]": 9}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    shutil.copytree(GOLDEN / "gpt2", tmp_path / "gpt2")
    text_lib.TextTokenizer(tokenizer).save(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_hidden_states_of_a_language_model_are_features_of_a_prompt(encoder):
    gpt = ig.load_decoder(encoder)
    prompts = ["a red bicycle", "the blue boat on the green boat", "", "a red bicycle of the boat on a red boat"]
    features_BPE, mask_BP = gpt.text_features(prompts, length=7)
    assert features_BPE.shape == (4, 7, 16)
    np.testing.assert_array_equal(mask_BP.sum(1), [3, 7, 0, 7])
    assert mask_BP[0].tolist() == [False] * 4 + [True] * 3
    assert not features_BPE[2].any()
    # Each is what the language model computes of the prompt alone.
    ids = np.array([gpt.setup.text.encode_batch(prompts[:1])[0]])
    alone = gpt(
        Sequence(jnp.asarray(ids), jnp.broadcast_to(jnp.arange(3)[None, :, None], (1, 3, 3)), jnp.ones((1, 3), int))
    )
    np.testing.assert_allclose(features_BPE[0, 4:], alone.hidden[0], atol=1e-5)

    # They are the prefix of a decoder of pictures.
    config = GPTConfig(
        vocab_size=20, width=16, depth=1, heads=2, mlp_width=32, feature_width=16, feature_length=7
    )  # fmt: skip
    decoder = GPT(config, key=jax.random.key(1))
    sequence = Sequence(
        jnp.zeros((4, 3), int), jnp.zeros((4, 3, 3), int), jnp.ones((4, 3), int),
        features=jnp.asarray(features_BPE), feature_mask=jnp.asarray(mask_BP),
    )  # fmt: skip
    logits = decoder(sequence).logits
    assert logits.shape == (4, 3, 20)
    assert not np.allclose(logits[0], logits[1])


def test_a_portable_folder_keeps_the_text_tokenizer(encoder, tmp_path):
    export.convert(encoder, tmp_path / "portable")
    first, again = (
        ig.load_decoder(path).text_features(["a red boat"], 4)[0] for path in (encoder, tmp_path / "portable")
    )
    np.testing.assert_array_equal(first, again)
    with pytest.raises(UserError, match="comes without a text tokenizer"):
        ig.load_decoder(GOLDEN / "gpt2").text_features(["a"], 4)
