"""Each kind of quantizer against its paper's equations in NumPy, and for the property it is known for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.quantizers import Quantizer, QuantizerConfig, fsq, init_stats, learn, lfq
from imagegpt_jax.models.quantizers import codebook as codebooks

VQ = QuantizerConfig(num_codes=8, code_dim=4, l2_normalize=False)
IBQ = dataclasses.replace(VQ, kind="ibq", index_weight=1.0, commitment_weight=1.0, codebook_weight=0.25)
FSQ = QuantizerConfig(kind="fsq", levels=(8, 5, 5), num_codes=200, code_dim=3, l2_normalize=False)
LFQ = QuantizerConfig(kind="lfq", num_codes=32, code_dim=5, l2_normalize=False, entropy_weight=0.1)
BSQ = dataclasses.replace(LFQ, l2_normalize=True)
ALL = {
    "vq": VQ,
    "vq normalised": dataclasses.replace(VQ, l2_normalize=True),
    "vq ema": dataclasses.replace(VQ, codebook_update="ema"),
    "residual": dataclasses.replace(VQ, depth=3),
    "grouped": dataclasses.replace(VQ, groups=2),
    "grouped residual": dataclasses.replace(VQ, groups=2, depth=2),
    "ibq": IBQ,
    "ibq in chunks": dataclasses.replace(IBQ, chunk_codes=4),
    "fsq": FSQ,
    "grouped fsq": dataclasses.replace(FSQ, code_dim=6, groups=2),
    "lfq": LFQ,
    "grouped lfq": dataclasses.replace(LFQ, code_dim=10, groups=2),
    "bsq": BSQ,
}


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


def make(config, seed=0):
    quantizer = Quantizer(config, key=jax.random.key(seed))
    if config.has_codebook:
        quantizer.embedding[...] = normal(seed + 1, config.num_ids, config.group_dim)
    return quantizer


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", ALL)
def test_training_and_use_agree(name):
    """The codes of training are those of `nearest`, and what is decoded is what `lookup` gives, to the last bit."""
    config = ALL[name]
    quantizer, z = make(config), 1.5 * normal(3, 2, 4, 3, config.code_dim)
    quantized = quantizer(z)
    assert quantized.codes.shape == (2, 4, 3 * config.codes_per_vector)
    assert quantized.vectors.shape == (2, 4, 3, config.codes_per_vector, config.group_dim)
    np.testing.assert_array_equal(quantized.codes, quantizer.nearest(z))
    np.testing.assert_array_equal(quantized.zq, quantizer.lookup(quantized.codes))
    counts = np.bincount(np.asarray(quantized.codes).ravel(), minlength=config.num_ids)
    np.testing.assert_array_equal(quantized.sums.counts_I, counts)
    groups = np.asarray(quantized.codes).reshape(-1, config.groups, config.depth) // config.num_codes
    np.testing.assert_array_equal(groups, np.broadcast_to(np.arange(config.groups)[:, None], groups.shape))
    gradient = jax.grad(lambda z: jnp.sum(quantizer(z).zq * 2.0))(z)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)


# ------------------------------------------------------------------------------------------- moving-average codebook


def test_moving_average_codebook_is_the_papers():
    """Equations 6 to 8 of VQ-VAE's appendix, with both averages kept, over three batches."""
    config = dataclasses.replace(VQ, codebook_update="ema", codebook_decay=0.7)
    quantizer, stats = make(config), init_stats(config)
    codebook = np.array(quantizer.embedding[...])
    count, total = np.zeros(8), np.zeros((8, 4))
    for step in range(3):
        z = np.asarray(normal(10 + step, 12, 4))
        codes = np.square(z[:, None] - codebook[None]).sum(-1).argmin(-1)
        quantizer.embedding[...] = jnp.array(codebook)
        quantized = quantizer(jnp.asarray(z))
        np.testing.assert_array_equal(quantized.codes, codes)
        assert set(quantized.losses) == {"commitment"}
        for k in range(8):
            count[k] = 0.7 * count[k] + 0.3 * (codes == k).sum()
            total[k] = 0.7 * total[k] + 0.3 * z[codes == k].sum(0)
            if count[k] > 0:
                codebook[k] = total[k] / count[k]
        moved = jnp.full_like(quantizer.embedding[...], 99.0)  # what the optimizer made of it does not count
        book, stats, revived = learn(
            config, (quantizer.embedding[...], moved), stats, quantized.sums, quantized.vectors, jax.random.key(0)
        )
        np.testing.assert_allclose(book, codebook, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(stats.average_I, count, rtol=1e-5)
        assert not bool(revived.any())


def test_moving_average_codebook_has_no_gradient():
    config = dataclasses.replace(VQ, codebook_update="ema")
    graphdef, params = nnx.split(make(config))
    gradient = jax.grad(lambda p: nnx.merge(graphdef, p)(normal(3, 6, 4)).loss)(params)
    np.testing.assert_array_equal(gradient.embedding[...], 0)


# ------------------------------------------------------------------------------------------------ residual, grouped


def test_residual_codes_are_of_what_is_left_over():
    config = dataclasses.replace(VQ, depth=3)
    quantizer, z = make(config), np.asarray(normal(3, 7, 4))
    codebook = np.array(quantizer.embedding[...])
    rest, codes, commitment, learned = z.copy(), [], 0.0, 0.0
    for _ in range(3):
        chosen = np.square(rest[:, None] - codebook[None]).sum(-1).argmin(-1)
        codes.append(chosen)
        learned += np.square(rest - codebook[chosen]).mean()
        rest = rest - codebook[chosen]
        commitment += np.square(rest).mean()
    quantized = quantizer(jnp.asarray(z))
    np.testing.assert_array_equal(quantized.codes.reshape(7, 3), np.stack(codes, axis=1))
    np.testing.assert_allclose(quantized.zq, z - rest, rtol=1e-5, atol=1e-6)
    assert float(quantized.losses["commitment"]) == pytest.approx(commitment, rel=1e-5)
    assert float(quantized.losses["codebook"]) == pytest.approx(learned, rel=1e-5)


def test_residual_loss_moves_codes_toward_what_they_stand_for():
    config = dataclasses.replace(VQ, depth=2)
    graphdef, params = nnx.split(make(config))
    z = normal(3, 5, 4)
    quantized = nnx.merge(graphdef, params)(z)
    gradient = jax.grad(lambda p: nnx.merge(graphdef, p)(z).losses["codebook"])(params).embedding[...]
    expected = np.zeros((8, 4))
    codes, rests = np.asarray(quantized.codes).reshape(5, 2), np.asarray(quantized.vectors)
    for n, d in np.ndindex(5, 2):
        expected[codes[n, d]] += 2 * (np.asarray(params.embedding[...])[codes[n, d]] - rests[n, d]) / z.size
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gradient_through_residual_codes_is_straight():
    config, weights = dataclasses.replace(VQ, depth=3), normal(5, 7, 4)
    gradient = jax.grad(lambda z: jnp.sum(make(config)(z).zq * weights))(normal(3, 7, 4))
    np.testing.assert_allclose(gradient, weights, rtol=1e-6)


def test_groups_are_quantizers_of_their_own():
    config = dataclasses.replace(VQ, groups=2, depth=2)
    both, z = make(config), normal(3, 7, 4)
    single = dataclasses.replace(config, groups=1, code_dim=2)
    quantized, commitment = both(z), 0.0
    for g in range(2):
        alone = make(single)
        alone.embedding[...] = both.embedding[8 * g : 8 * g + 8]
        part = alone(z[:, 2 * g : 2 * g + 2])
        codes = np.asarray(quantized.codes).reshape(7, 2, 2)[:, g]
        np.testing.assert_array_equal(codes, part.codes.reshape(7, 2) + 8 * g)
        np.testing.assert_array_equal(quantized.zq[:, 2 * g : 2 * g + 2], part.zq)
        commitment += float(part.losses["commitment"]) / 2
    assert float(quantized.losses["commitment"]) == pytest.approx(commitment, rel=1e-6)


def test_dead_codes_of_a_group_are_revived_from_that_group():
    config = dataclasses.replace(VQ, groups=2, revival_steps=3)
    quantizer, z = make(config), normal(3, 40, 4) + jnp.array([0.0, 0.0, 100.0, 100.0])
    quantized = quantizer(z)
    book = quantizer.embedding[...]
    book, stats, revived = learn(
        config, (book, book), init_stats(config), quantized.sums, quantized.vectors, jax.random.key(1)
    )
    assert bool(revived.all())
    assert np.all(np.abs(book[:8]) < 50)
    assert np.all(np.asarray(book[8:]) > 50)
    np.testing.assert_array_equal(stats.average_I, 1)


# --------------------------------------------------------------------------------------------- index backpropagation


def plain_ibq(z, codebook):
    """Equations 4 to 7 of arXiv:2412.02692 with the whole one-hot matrix."""
    soft = jax.nn.softmax(z @ codebook.T, axis=-1)
    hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), len(codebook))
    one_hot = hard - jax.lax.stop_gradient(soft) + soft
    zq, chosen = one_hot @ codebook, hard @ codebook
    stop = jax.lax.stop_gradient
    loss = jnp.mean((zq - z) ** 2) + jnp.mean((stop(chosen) - z) ** 2) + 0.25 * jnp.mean((chosen - stop(z)) ** 2)
    return zq, loss


@pytest.mark.parametrize("chunk", [8, 2])
def test_index_backpropagation_is_the_papers_and_reaches_every_code(chunk):
    config = dataclasses.replace(IBQ, chunk_codes=chunk)
    graphdef, params = nnx.split(make(config))
    z, weights = normal(3, 6, 4), normal(4, 6, 4)

    def ours(z, codebook):
        quantized = nnx.merge(graphdef, jax.tree.map(lambda _: codebook, params))(z)
        return jnp.sum(quantized.zq * weights) + quantized.loss, quantized

    def plain(z, codebook):
        zq, loss = plain_ibq(z, codebook)
        return jnp.sum(zq * weights) + loss

    codebook = params.embedding[...]
    (value, quantized), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(z, codebook)
    expected, expected_gradients = jax.value_and_grad(plain, argnums=(0, 1))(z, codebook)
    np.testing.assert_array_equal(quantized.codes, np.argmax(z @ codebook.T, axis=-1))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert len(np.unique(quantized.codes)) < 8
    assert np.all(np.abs(gradients[1]).max(axis=1) > 1e-6), "every code, chosen or not, has a gradient"


# ------------------------------------------------------------------------------------------------------------- FSQ


def test_fsq_is_the_published_listing():
    levels = np.array([8, 5, 5])
    z = np.asarray(2 * normal(3, 50, 3), np.float64)
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    bounded = np.tanh(z + np.tan(offset / half)) * half - offset
    rounded = np.round(bounded)
    codes = ((rounded + levels // 2) * [1, 8, 40]).sum(-1)
    quantized = make(FSQ)(jnp.asarray(z, jnp.float32))
    np.testing.assert_array_equal(quantized.codes, codes)
    np.testing.assert_allclose(quantized.zq, rounded / (levels // 2), rtol=1e-6)
    assert quantized.losses == {}
    assert float(quantized.loss) == 0


def test_fsq_codes_and_indices_are_one_to_one():
    codes = make(FSQ).lookup(jnp.arange(200))
    assert len(np.unique(np.asarray(codes), axis=0)) == 200
    assert np.abs(codes).max() == 1


def test_fsq_uses_every_code():
    """Without any loss: numbers spread over the line fall into every interval."""
    quantized = make(FSQ)(1.2 * normal(3, 20_000, 3))
    assert float(jnp.mean(quantized.sums.counts_I > 0)) == 1


def test_fsq_gradient_is_that_of_the_bound():
    z = normal(3, 9, 3)
    gradient = jax.grad(lambda z: jnp.sum(make(FSQ)(z).zq))(z)
    half = jnp.array([4.0, 2.0, 2.0])
    expected = jax.grad(lambda z: jnp.sum(fsq.bound(z, FSQ.levels) / half))(z)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- LFQ, BSQ


@pytest.mark.parametrize("config", [LFQ, BSQ], ids=["lfq", "bsq"])
def test_codes_are_signs(config):
    z = np.asarray(normal(3, 40, 5))
    quantized = make(config)(jnp.asarray(z))
    value = 5**-0.5 if config.l2_normalize else 1.0
    np.testing.assert_allclose(quantized.zq, np.where(z > 0, value, -value), rtol=1e-6)
    np.testing.assert_array_equal(quantized.codes, ((z > 0) * 2 ** np.arange(5)).sum(-1))
    compared = unit(z) if config.l2_normalize else z
    expected = np.square(compared - np.asarray(quantized.zq)).mean()
    assert float(quantized.losses["commitment"]) == pytest.approx(expected, rel=1e-5)
    codes = make(config).lookup(jnp.arange(32))
    assert len(np.unique(np.asarray(codes), axis=0)) == 32
    if config.l2_normalize:
        np.testing.assert_allclose(np.linalg.norm(codes, axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize("config", [LFQ, BSQ], ids=["lfq", "bsq"])
@pytest.mark.parametrize("temperature", [2.0, 0.1])
def test_entropy_of_signs_is_that_over_all_codes(config, temperature):
    """Value and gradient of the factored form against the softmax over the whole codebook."""
    config = dataclasses.replace(config, entropy_temperature=temperature)
    quantizer = make(config)
    codes = quantizer.lookup(jnp.arange(32))
    z = 0.3 * normal(3, 11, 5)
    z = jnp.asarray(unit(np.asarray(z))) if config.l2_normalize else z
    value = float(np.abs(codes).max())
    plain = jax.value_and_grad(lambda z: codebooks.entropy_loss(z, codes, temperature, 32))(z)
    factored = jax.value_and_grad(lambda z: lfq.entropy_loss(z, value, temperature))(z)
    assert float(factored[0]) == pytest.approx(float(plain[0]), rel=1e-4, abs=1e-5)
    if not config.l2_normalize:
        np.testing.assert_allclose(factored[1], plain[1], rtol=1e-3, atol=1e-5)
    assert float(quantizer(z).losses["entropy"]) == pytest.approx(float(plain[0]), rel=1e-4, abs=1e-5)


def test_entropy_of_signs_is_least_when_sure_codes_are_evenly_used():
    corners = 50 * (2.0 * (np.arange(32)[:, None] >> np.arange(5) & 1) - 1)
    assert float(lfq.entropy_loss(jnp.asarray(corners), 1.0, 0.1)) == pytest.approx(-5 * np.log(2), rel=1e-4)
    assert float(lfq.entropy_loss(jnp.full((9, 5), 50.0), 1.0, 0.1)) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------- large codebooks


def largest_array(jaxpr):
    """Elements of the largest array that a program makes, in loops and recomputed parts too."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes.append(largest_array(inner))
    return max(sizes)


@pytest.mark.parametrize("kind", ["vq", "ibq", "fsq", "lfq"])
def test_no_array_has_all_vectors_times_a_codebook_of_2_to_18(kind):
    count, size = 1024, 1 << 18
    levels = (8, 8, 8, 8, 8, 8) if kind == "fsq" else ()
    config = QuantizerConfig(
        kind=kind,
        num_codes=size,
        code_dim={"fsq": 6, "lfq": 18}.get(kind, 16),
        levels=levels,
        l2_normalize=False,
        chunk_codes=4096,
        index_weight=1.0,
        entropy_weight=0.0 if kind == "fsq" else 0.1,
    )
    graphdef, params = nnx.split(jax.eval_shape(lambda: Quantizer(config, key=jax.random.key(0))))

    def loss(params, z):
        quantized = nnx.merge(graphdef, params)(z)
        return jnp.sum(quantized.zq) + quantized.loss, quantized.sums

    z = jax.ShapeDtypeStruct((count, config.code_dim), jnp.float32)
    program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, z)
    assert largest_array(program.jaxpr) <= max(size * 16, count * 4096)
    whole = jax.make_jaxpr(lambda z: jnp.zeros((count, size)).at[:, 0].add(z[:, 0]))(z)
    assert largest_array(whole.jaxpr) == count * size


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "ibqq"}, "Did you mean 'ibq'"),
        ({"kind": "fsq", "levels": (8, 8), "code_dim": 2, "num_codes": 60, "l2_normalize": False}, "num_codes=64"),
        ({"kind": "fsq", "levels": (8, 8), "code_dim": 3, "num_codes": 64, "l2_normalize": False}, "each of the 3"),
        ({"kind": "fsq", "levels": (8, 8), "code_dim": 2, "num_codes": 64}, "l2_normalize=False"),
        ({"kind": "lfq", "code_dim": 9, "num_codes": 500}, "num_codes=512"),
        ({"levels": (8, 8)}, "kind='vq' has no levels: set levels="),
        ({"depth": 2}, "l2_normalize=False"),
        ({"kind": "ibq", "codebook_update": "ema"}, "codebook_update='gradient'"),
        ({"codebook_update": "emma"}, "Did you mean 'ema'"),
        ({"groups": 3}, "code_dim=8 does not divide by groups=3"),
        ({"kind": "lfq", "code_dim": 3, "num_codes": 8, "revival_steps": 5}, "revival_steps=0"),
    ],
)
def test_mistakes_are_explained(settings, told):
    with pytest.raises(UserError, match=told):
        QuantizerConfig(**settings)
