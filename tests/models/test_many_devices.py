"""The tokenizer's global reductions on eight virtual devices, in a process of their own."""

import os
import subprocess
import sys
import textwrap

import pytest

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def on_eight_devices(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")


@pytest.mark.parametrize(("kind", "update"), [("vq", "gradient"), ("vq", "ema"), ("ibq", "gradient")])
def test_a_codebook_is_searched_in_pieces(kind, update):
    """Codes, losses and gradients as on one device, and no device ever holds the codebook or all similarities."""
    code = """
        import math, re, sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from imagegpt_jax import sharding, state
        from imagegpt_jax.models import quantizers

        K, Z, CHUNK, N = 2048, 32, 512, 512
        kind, update = sys.argv[1:]
        config = quantizers.QuantizerConfig(
            kind=kind, num_codes=K, code_dim=Z, chunk_codes=CHUNK, entropy_weight=0.1, entropy_temperature=0.5,
            revival_steps=3, codebook_update=update, index_weight=0.3
        )
        net = state.network(lambda key: quantizers.Quantizer(config, key=key))
        codebook_KZ = jax.random.normal(jax.random.key(1), (K, Z))
        # Each code of the first half appears again in the second: in another piece, and in the same chunk.
        codebook_KZ = codebook_KZ.at[K // 2 :].set(codebook_KZ[: K // 2])
        vectors = codebook_KZ[:N].reshape(8, 8, 8, Z) + 0.01 * jax.random.normal(jax.random.key(2), (8, 8, 8, Z))

        def step(params, z):
            def loss(params, z):
                quantized = net.module(params)(z)
                return quantized.loss + jnp.sum(jnp.sin(quantized.zq)), quantized
            (_, quantized), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, z)
            stats = quantizers.init_stats(config)._replace(step=1)
            books = params["embedding"], params["embedding"]
            codebook, _, _ = quantizers.learn(
                config, books, stats, quantized.sums, quantized.vectors, jax.random.key(3)
            )
            return quantized.codes, quantized.losses, grads, quantized.sums.counts_I, codebook

        def run(shape):
            mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), shape)), jax.devices()[: math.prod(shape)])
            with jax.set_mesh(mesh):
                rows = sharding.batch_sharding(mesh)
                held = jax.tree.map(
                    lambda spec: NamedSharding(mesh, spec),
                    sharding.module_specs(net.abstract, mesh), is_leaf=lambda x: isinstance(x, P),
                )
                whole = sharding.replicated(mesh)
                outs = rows, whole, (held, rows), whole, held["embedding"]
                args = jax.device_put(({"embedding": codebook_KZ}, vectors), (held, rows))
                compiled = jax.jit(step, out_shardings=outs).lower(*args).compile()
                arrays = re.findall(r"(?:f32|s32|pred)\\[([0-9,]+)\\]", compiled.as_text())
                largest = max(math.prod(map(int, dims.split(","))) for dims in arrays)
                return largest, jax.device_get(compiled(*args))

        assert N * CHUNK > K * Z  # so that neither all similarities of a chunk nor the codebook pass below
        alone, expected = run((1, 1, 1))
        assert alone >= N * CHUNK
        if kind == "vq":
            np.testing.assert_array_equal(expected[0].ravel(), np.arange(N))  # the first of two equal codes
        for shape in ((2, 2, 2), (1, 2, 4)):
            largest, got = run(shape)
            assert largest < K * Z, (shape, largest)
            np.testing.assert_array_equal(got[0], expected[0])
            np.testing.assert_array_equal(got[3], expected[3])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
        print("ok")
    """
    on_eight_devices(code, kind, update)


def test_batch_norm_is_that_of_the_whole_batch():
    """Logits and gradients as on one device, of rows so unlike that a device's own statistics would be far off."""
    on_eight_devices("""
        import jax, jax.numpy as jnp, numpy as np
        from imagegpt_jax import sharding, state
        from imagegpt_jax.models.discriminator import Discriminator, DiscriminatorConfig

        config = DiscriminatorConfig(base_width=8, num_layers=2)
        graphdef, params = state.split(Discriminator(config, key=jax.random.key(0)))
        scale_B = jnp.arange(1, 9)[:, None, None, None] / 8
        images = scale_B * jax.random.normal(jax.random.key(1), (8, 16, 16, 3))

        def logits(params, images):
            return state.merge(graphdef, params)(images)

        def step(params, images):
            return logits(params, images), jax.grad(lambda p: jnp.sum(jnp.sin(logits(p, images))))(params)

        expected = jax.device_get(jax.jit(step)(params, images))
        own = jax.jit(jax.vmap(lambda x: logits(params, x[None])[0]))(images)
        assert np.abs(own - expected[0]).max() > 0.1 * np.abs(expected[0]).max()
        mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
        with jax.set_mesh(mesh):
            args = jax.device_put((params, images), (sharding.replicated(mesh), sharding.batch_sharding(mesh)))
            got = jax.device_get(jax.jit(step)(*args))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, expected)
        print("ok")
    """)


def test_parts_of_a_batch_are_cut_where_they_lie():
    """Accumulation over three parts: sums and rows of the whole batch, and no row leaves its device."""
    on_eight_devices("""
        import re
        import jax, jax.numpy as jnp, numpy as np
        from imagegpt_jax import sharding
        from imagegpt_jax.accumulate import accumulate

        mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
        rows = sharding.batch_sharding(mesh)

        def step(x):
            return accumulate(lambda x: (jnp.sum(x), {}, x * 2), x, 3)

        with jax.set_mesh(mesh):
            x = jax.device_put(jnp.arange(48.0).reshape(24, 2), rows)
            outs = sharding.replicated(mesh), {}, rows
            compiled = jax.jit(step, out_shardings=outs).lower(x).compile()
            total, _, doubled = compiled(x)
        np.testing.assert_array_equal(doubled, 2 * np.arange(48).reshape(24, 2))
        assert float(total) == 48 * 47 / 2
        moves = set(re.findall(r"(all-to-all|collective-permute|all-gather|all-reduce)[(]", compiled.as_text()))
        assert moves == {"all-reduce"}, moves
        print("ok")
    """)
