"""The loss over the vocabulary in chunks: what scoring it at once gives, without the memory."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.losses import chunked_cross_entropy

RNG = np.random.default_rng(0)
HIDDEN_BMD = jnp.asarray(RNG.normal(size=(2, 5, 8)), jnp.float32)
TABLE_VD = jnp.asarray(RNG.normal(size=(50, 8)), jnp.float32)
TARGETS_BM = jnp.asarray(RNG.integers(0, 50, (2, 5)))
WEIGHTS_BM = jnp.asarray(RNG.random((2, 5)), jnp.float32)


def loss(hidden_BMD, table_VD, chunk):
    nll_BM = chunked_cross_entropy.token_nll(hidden_BMD, table_VD, TARGETS_BM, chunk=chunk)
    return (nll_BM * WEIGHTS_BM).sum(), nll_BM


def test_one_chunk_is_the_definition():
    logits = np.einsum("bmd,vd->bmv", np.float64(HIDDEN_BMD), np.float64(TABLE_VD))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, np.asarray(TARGETS_BM)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss(HIDDEN_BMD, TABLE_VD, 50)[1], expected, rtol=1e-5)


@pytest.mark.parametrize("chunk", [7, 10, 25, 49])  # dividing the vocabulary and not
def test_chunks_give_the_same_values_and_gradients(chunk):
    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (total, nll), grads = grad(HIDDEN_BMD, TABLE_VD, chunk)
    (expected_total, expected_nll), expected_grads = grad(HIDDEN_BMD, TABLE_VD, 50)
    np.testing.assert_allclose(total, expected_total, rtol=1e-6)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5)
    for gradient, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
        assert jnp.abs(gradient).max() > 0.01


def test_no_logits_of_the_whole_vocabulary_exist():
    def largest(chunk):
        compiled = jax.jit(jax.grad(lambda h, t: loss(h, t, chunk)[0], argnums=(0, 1))).lower(HIDDEN_BMD, TABLE_VD)
        return "2x5x50xf32" in compiled.as_text()

    assert largest(50)
    assert not largest(10)


def test_extreme_logits_stay_finite():
    value, grads = jax.value_and_grad(lambda h: loss(h, TABLE_VD, 10)[0])(HIDDEN_BMD * 1e4)
    assert np.isfinite(value)
    assert np.isfinite(grads).all()


def test_bfloat16_states_are_scored_in_float32():
    nll = loss(HIDDEN_BMD.astype(jnp.bfloat16), TABLE_VD.astype(jnp.bfloat16), 10)[1]
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, loss(HIDDEN_BMD, TABLE_VD, 10)[1], atol=0.2)


def test_a_vocabulary_cut_over_devices_is_scored_in_parts():
    """As on one device, also where a part is padding alone; more chunks send no more: d hidden is summed once."""
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from imagegpt_jax.perf import hlo
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax.losses import chunked_cross_entropy

        rng = np.random.default_rng(0)
        mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 4})

        def score(vocab, chunk, dtype, tolerance):
            hidden, table = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((4, 5, 8), (vocab, 8)))
            targets = jnp.asarray(rng.integers(0, vocab, (4, 5)))

            def loss(hidden, table, chunk):
                hidden = sharding.constrain(hidden, ("batch", None, None))
                table = sharding.constrain(table, ("vocab", None))
                nll = chunked_cross_entropy.token_nll(hidden, table, targets, chunk=chunk)
                return (nll * jnp.arange(20).reshape(4, 5)).sum()

            grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
            expected = grad(hidden, table, vocab)
            with jax.set_mesh(mesh):
                compiled = grad.lower(hidden, table, chunk).compile()
                results = compiled(hidden, table)
            for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected)):
                x, y = np.float64(x), np.float64(y)
                assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), (vocab, chunk, dtype)
            moved = hlo.count(compiled.as_text())
            assert vocab == 9 or moved["all-to-all"].count == 1, moved  # columns of d hidden, which is never whole
            return sum(total.bytes for total in moved.values())

        score(9, 5, "float32", 1e-5)  # two rows a chunk and a part: the last part has none of the nine
        sent = [score(64, chunk, "float32", 1e-5) for chunk in (16, 4)]
        assert sent[0] == sent[1], sent
        score(64, 16, "bfloat16", 0.02)
        print("ok")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"
