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
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax import train_state
        from imagegpt_jax.models import quantizers

        K, Z, CHUNK, N = 2048, 32, 512, 512
        kind, update = sys.argv[1:]
        config = quantizers.QuantizerConfig(
            kind=kind, num_codes=K, code_dim=Z, chunk_codes=CHUNK, entropy_weight=0.1, entropy_temperature=0.5,
            revival_steps=3, codebook_update=update, index_weight=0.3
        )
        net = train_state.network(lambda key: quantizers.Quantizer(config, key=key))
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
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax import train_state
        from imagegpt_jax.models.discriminator import Discriminator
        from imagegpt_jax.models.discriminator import DiscriminatorConfig

        config = DiscriminatorConfig(base_width=8, num_layers=2)
        graphdef, params = train_state.split(Discriminator(config, key=jax.random.key(0)))
        scale_B = jnp.arange(1, 9)[:, None, None, None] / 8
        images = scale_B * jax.random.normal(jax.random.key(1), (8, 16, 16, 3))

        def logits(params, images):
            return train_state.merge(graphdef, params)(images)

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
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax.training.grad_accumulation import accumulate

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


def test_a_stream_cut_over_tensor_is_gathered_once_for_all_that_read_it():
    """A block gathers its stream, sums attention and scatters the mlp once each: no product fetches its own operand."""
    on_eight_devices("""
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from imagegpt_jax.perf import hlo
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax import train_state
        from imagegpt_jax.models import gpt

        DEPTH = 3
        config = gpt.GPTConfig(vocab_size=64, width=32, depth=DEPTH, heads=4, mlp_width=48, remat="full", bias=True)
        net = train_state.network(lambda key: gpt.GPT(config, key=key))
        ids = jnp.zeros((8, 16), jnp.int32)

        def total(params):
            return jnp.sum(jnp.sin(net.module(params)(gpt.plain_sequence(ids)).hidden))

        mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 4})
        with jax.set_mesh(mesh):
            specs = sharding.module_specs(net.abstract, mesh)
            layout = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))
            make = jax.jit(lambda: train_state.split(gpt.GPT(config, key=jax.random.key(0)))[1], out_shardings=layout)
            params = make()
            # Forward; then forward, recomputed and backward; and the embedding once each way. Scatters are all-to-alls
            # on CPU, and so are their gradients (`parallel.manual_collectives.scatter_rows`).
            for function, expected in ((total, (DEPTH, DEPTH + 1)), (jax.grad(total), (2 * DEPTH, 3 * DEPTH + 2))):
                moved = hlo.count(jax.jit(function).lower(params).compile().as_text())
                assert (moved["all-gather"].count, moved["all-to-all"].count) == expected, moved
        print("ok")
    """)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_blocks_of_every_kind_are_the_same_on_any_mesh(dtype):
    """Values and gradients with biases, every dropout, and shifts, scales and gates from a condition."""
    code = """
        import dataclasses, math, sys
        import jax, jax.numpy as jnp, numpy as np
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax import train_state
        from imagegpt_jax.models import gpt

        dtype = sys.argv[1]
        jax.config.update("jax_enable_x64", dtype == "float64")
        kinds = (
            {"bias": True, "norm": "layer", "mlp": "gelu", "scan": False, "token_dropout": 0.2,
             "attention_dropout": 0.2, "residual_dropout": 0.2, "mlp_dropout": 0.2},
            {"conditioning": "adaptive_norm", "qk_norm": True, "kv_heads": 4, "heads": 8, "remat": "full"},
        )
        ids = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(2), jnp.arange(8))
        for kind in kinds:
            config = gpt.GPTConfig(**{
                "vocab_size": 64, "width": 32, "depth": 2, "heads": 4, "mlp_width": 48, "dtype": dtype,
                "param_dtype": "float64" if dtype == "float64" else "float32", **kind,
            })
            graphdef, params = train_state.split(gpt.GPT(config, key=jax.random.key(0)))
            params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape, x.dtype), params)
            sequence = gpt.plain_sequence(ids)
            if "conditioning" in kind:
                sequence = dataclasses.replace(sequence, condition=ids[:, 0])
            drops = keys if "mlp_dropout" in kind else None

            def loss(params):
                return jnp.mean(jnp.sin(train_state.merge(graphdef, params)(sequence, key=drops).logits))

            def run(shape):
                sizes = dict(zip(("data", "fsdp", "tensor"), shape))
                mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(shape)])
                with jax.set_mesh(mesh):
                    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))

            expected = run((1, 1, 1))
            for shape in ((2, 2, 2), (2, 1, 4), (1, 2, 4))[: None if dtype == "float64" else 1]:
                for a, b in zip(jax.tree.leaves(run(shape)), jax.tree.leaves(expected), strict=True):
                    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                    error = np.abs(a - b).max() / np.abs(b).max()
                    assert error < (1e-11 if dtype == "float64" else 0.06), (kind, shape, b.shape, error)
        print("ok")
    """
    on_eight_devices(code, dtype)
