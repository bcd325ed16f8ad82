"""Decoding over the devices of a mesh, in a process with eight virtual ones."""

import os
import subprocess
import sys
import textwrap

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def on_eight_devices(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")


def test_the_same_bits_on_one_device_and_on_eight_and_logits_to_5e_5_under_tensor_parallelism():
    on_eight_devices("""
        import jax, jax.numpy as jnp, numpy as np
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax.data.packing import Layout
        from imagegpt_jax.data.packing import TokenSpace
        from imagegpt_jax.sampling.settings import Sampling
        from imagegpt_jax.sampling.jobs import image_job
        from imagegpt_jax.sampling.batching import place
        from imagegpt_jax.sampling.batching import run
        from imagegpt_jax.models.gpt import GPT
        from imagegpt_jax.models.gpt import GPTConfig

        space = TokenSpace(text_vocab=20, num_classes=4, num_codes=64)
        layout = Layout(space=space, text_length=4, grid=(3, 3))
        config = GPTConfig(vocab_size=space.vocab_size, width=64, depth=2, heads=4, mlp_width=128)
        gpt = jax.jit(lambda key: jax.tree.map(lambda x: 4 * x, GPT(config, key=key)))(jax.random.key(0))
        gpt = jax.device_put(gpt, jax.devices()[0])  # as a checkpoint is read
        rng = np.random.default_rng(0)
        texts = [rng.integers(0, 20, rng.integers(0, 5)).tolist() for _ in range(64)]
        how = Sampling(cfg_scale=2.0, top_k=40, top_p=0.95)

        def mesh(data, fsdp, tensor):
            sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
            return sharding.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])

        def draw(which=slice(None), mesh=None, batch_size=4, given=None):
            job = image_job(layout, [(texts[which], None)], how, given=given)
            indices = np.arange(64)[which]
            return run(gpt, job, how, 5, sample_indices=indices, batch_size=batch_size, mesh=mesh)

        def same(a, b):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.log_likelihood.view(np.int32), b.log_likelihood.view(np.int32))

        one = draw()
        assert len({tuple(t) for t in one.tokens.tolist()}) == 64
        for shape in ((8, 1, 1), (2, 4, 1)):
            eight = draw(mesh=mesh(*shape))
            same(one, eight)
        rest = draw(slice(37, None), mesh=mesh(8, 1, 1))  # a list that goes on in the middle
        np.testing.assert_array_equal(rest.tokens, one.tokens[37:])
        alone = draw(slice(41, 42))
        np.testing.assert_array_equal(alone.tokens, one.tokens[41:42])

        # The same tokens, under other shapes of the products: their log-likelihoods, of nine tokens, in nats.
        def scores(**kwargs):
            return draw(given=one.tokens, **kwargs).log_likelihood / 9
        for other in ({"mesh": mesh(1, 1, 2)}, {"mesh": mesh(2, 2, 2)}, {"batch_size": 7}):
            np.testing.assert_allclose(scores(**other), one.log_likelihood / 9, atol=5e-5)
        cut = place(gpt, mesh=mesh(2, 2, 2)).blocks[0].attention.query.weight[...]
        assert {s.data.shape for s in cut.addressable_shards} == {(32, 64)}, cut.sharding
        try:
            place(gpt, mesh=mesh(1, 1, 8))
        except Exception as e:
            assert "model.heads=4 does not divide over mesh.tensor=8" in str(e)
        else:
            raise AssertionError
        print("ok")
    """)
