import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from imagegpt_jax.errors import UserError
from imagegpt_jax.training import optimizers, shampoo


def config(**changes):
    base = {
        "name": "adamw", "lr": 0.1, "schedule": "cosine", "warmup_steps": 2, "final_lr_ratio": 0.1,
        "decay_start": 0, "drops": (), "drop_factor": 0.1, "b1": 0.9,
        "b2": 0.95, "eps": 1e-8, "mu_dtype": "float32", "nu_dtype": "float32", "weight_decay": 0.0, "clip_norm": 0.0,
    }  # fmt: skip
    return ConfigDict({**base, **changes})


PARAMS = {"matrix": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5)), "table": jnp.ones((6, 4))}
AXES = {"matrix": ("embed", "mlp"), "bias": ("mlp",), "table": ("vocab", "embed")}  # the first two: 3 stacked layers


def test_schedule_warms_up_and_decays():
    rate = optimizers.schedule(config(), steps=12)
    np.testing.assert_allclose([rate(0), rate(1), rate(2)], [0.05, 0.1 - 0.025, 0.1], rtol=0.4)
    np.testing.assert_allclose(rate(2), 0.1, rtol=1e-6)
    np.testing.assert_allclose(rate(7), 0.1 * (0.9 * 0.5 + 0.1), rtol=1e-6)
    np.testing.assert_allclose(rate(12), 0.01, rtol=1e-6)
    np.testing.assert_allclose(optimizers.schedule(config(schedule="constant", warmup_steps=0), 12)(0), 0.1)


def test_schedules_hold_decay_and_drop():
    rate = optimizers.schedule(config(schedule="exponential", decay_start=4, final_lr_ratio=0.01), steps=12)
    np.testing.assert_allclose([rate(2), rate(4), rate(8), rate(12)], [0.1, 0.1, 0.01, 0.001], rtol=1e-5)
    rate = optimizers.schedule(config(schedule="drops", drops=(5, 8), warmup_steps=2), steps=12)
    np.testing.assert_allclose([rate(i) for i in (2, 4, 5, 7, 8, 12)], [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)
    for wrong, told in (({"decay_start": 12}, "decay_start=12"), ({"decay_start": 1}, "before warmup_steps=2")):
        with pytest.raises(UserError, match=told):
            optimizers.schedule(config(**wrong), 12)


def test_adafactor_is_its_papers_equations():
    """Factored second moment with Adam's correction, update clipped to an RMS of one, decoupled decay: two steps."""
    tx = optimizers.make(
        config(name="adafactor", b1=0.5, b2=0.9, weight_decay=0.2, schedule="constant", warmup_steps=0),
        12,
        {"w": ("embed", "mlp")},
    )
    w = np.asarray(jax.random.normal(jax.random.key(0), (160, 130)))
    state, rows, columns, momentum = tx.init({"w": w}), 0.0, 0.0, 0.0
    for step in range(2):
        g = np.asarray(jax.random.normal(jax.random.key(1 + step), w.shape))
        b2 = 0.9 * (1 - 0.9**step) / (1 - 0.9 ** (step + 1))
        rows = b2 * rows + (1 - b2) * np.square(g).mean(1)
        columns = b2 * columns + (1 - b2) * np.square(g).mean(0)
        u = g / np.sqrt(rows[:, None] * columns[None] / rows.mean())
        u = u / max(1.0, np.sqrt(np.square(u).mean()))
        momentum = 0.5 * momentum + 0.5 * u
        updates, state = tx.update({"w": g}, state, {"w": w})
        np.testing.assert_allclose(updates["w"], -0.1 * (momentum + 0.2 * w), rtol=1e-4, atol=1e-6)


def test_inverse_fourth_root():
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 9, 5)), np.float64)
    a = x @ x.swapaxes(1, 2) + 0.01 * np.eye(9)
    values, vectors = np.linalg.eigh(a)
    ridge = shampoo.RIDGE * np.abs(a).sum(-1).max(-1)[:, None, None] * np.eye(9)
    values = np.linalg.eigvalsh(a + ridge)
    expected = (vectors * values[:, None] ** -0.25) @ vectors.swapaxes(1, 2)
    root = shampoo.inverse_fourth_root(jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(root, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", [8, 3])
def test_shampoo_preconditions_both_sides_of_each_block(block):
    """After its start: L^-1/4 G R^-1/4 of every block, as large as RMSProp's step on the normalised gradient."""
    axes = {"w": ("embed", "mlp"), "b": ("mlp",)}
    tx = shampoo.scale_by_shampoo(0.0, 0.8, axes, block=block, every=1, start=2)
    params = {"w": jnp.ones((2, 5, 4)), "b": jnp.ones((2, 4))}  # two stacked layers
    state, left, right, squares = tx.init(params), {}, {}, 0.0
    cuts = [slice(0, 5)] if block == 8 else [slice(0, 3), slice(3, 6)]
    columns = [slice(0, 4)] if block == 8 else [slice(0, 2), slice(2, 4)]
    for step in range(2):
        grads = jax.tree.map(lambda p, s=step: jax.random.normal(jax.random.key(s), p.shape), params)
        updates, state = jax.jit(tx.update)(grads, state)
        g = np.asarray(grads["w"][1], np.float64)
        squares = 0.8 * squares + 0.2 * np.square(g / np.linalg.norm(g))
        graft = g / np.linalg.norm(g) / np.sqrt(squares)
        direction = np.zeros_like(g)
        for r in cuts:
            for c in columns:
                part, key = g[r, c], (r.start, c.start)
                left[key] = 0.8 * left.get(key, 0) + 0.2 * part @ part.T
                right[key] = 0.8 * right.get(key, 0) + 0.2 * part.T @ part
                roots = [np.asarray(shampoo.inverse_fourth_root(jnp.asarray(s))) for s in (left[key], right[key])]
                direction[r, c] = roots[0] @ part @ roots[1]
        expected = graft if step == 0 else direction * np.linalg.norm(graft) / np.linalg.norm(direction)
        np.testing.assert_allclose(updates["w"][1], expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())
    b = np.asarray(grads["b"][1])
    np.testing.assert_allclose(np.sign(updates["b"][1]), np.sign(b))


def test_wrong_values_are_named():
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        optimizers.schedule(config(schedule="cosin"), 12)
    with pytest.raises(UserError, match="Did you mean 'muon'"):
        optimizers.make(config(name="moun"), 12, AXES)
    with pytest.raises(UserError, match="warmup_steps=12"):
        optimizers.schedule(config(warmup_steps=12), 12)


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"b1": 1.5}, {"b2": 1.0}, {"clip_norm": -1.0}]
)
def test_numbers_that_no_optimizer_has_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(
        UserError, match=rf"--config\.discriminator_optim\.{name}={value} must be at least 0 .*is usual"
    ):
        optimizers.make(config(**wrong), 12, AXES, key="discriminator_optim")


def test_only_matrices_decay():
    tx = optimizers.make(config(weight_decay=0.5, schedule="constant", warmup_steps=0), 12, AXES)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["table"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], 0.0)  # two dimensions, but one of them is the stack of layers


def test_muon_orthogonalises_matrices_layer_by_layer():
    tx = optimizers.make(config(name="muon", schedule="constant", warmup_steps=0), 12, AXES)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    for layer in range(3):
        values = np.linalg.svd(np.asarray(updates["matrix"][layer]), compute_uv=False)
        assert values.max() / values.min() < 2  # Newton-Schulz brings singular values near one another
        raw = np.linalg.svd(np.asarray(grads["matrix"][layer]), compute_uv=False)
        assert raw.max() / raw.min() > 2
    # Embeddings are trained by Adam (with Nesterov momentum), whose first update is a multiple of the gradient's sign.
    size = abs(float(updates["table"][0, 0]))
    np.testing.assert_allclose(updates["table"], -size * np.sign(grads["table"]), rtol=1e-4)
    # One update has the size of Adam's: root mean square 0.2 lr.
    rms = float(jnp.sqrt(jnp.mean(updates["matrix"] ** 2)))
    assert 0.1 * 0.2 * 0.5 < rms < 0.1 * 0.2 * 1.5


def test_clipping_bounds_the_gradient():
    tx = optimizers.make(
        config(name="sgd", b1=0.0, clip_norm=1.0, schedule="constant", warmup_steps=0, lr=1.0), 12, AXES
    )
    grads = jax.tree.map(lambda p: 10 * jnp.ones_like(p), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(optax.global_norm(updates), 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "lion", "adafactor", "shampoo", "sgd"])
def test_every_optimizer_descends(name):
    tx = optimizers.make(config(name=name, lr=0.02, schedule="constant", warmup_steps=0), 50, AXES)
    params, target = PARAMS, jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), PARAMS)

    def loss(p):
        return sum(jnp.mean((a - b) ** 2) for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    before = loss(params)
    for _ in range(20):
        params, state = step(params, state)
    assert loss(params) < before


def test_average_warms_up():
    ema = optimizers.update_ema({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.99, jnp.asarray(0))
    np.testing.assert_allclose(ema["w"], 0.9, rtol=1e-6)
    ema = optimizers.update_ema({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.5, jnp.asarray(10_000))
    np.testing.assert_allclose(ema["w"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("nu_dtype", ["float32", "bfloat16"])
def test_adam_keeps_its_moments_in_the_dtypes_of_the_config(nu_dtype):
    optimizer = optimizers.make(config(name="adamw", mu_dtype="bfloat16", nu_dtype=nu_dtype, warmup_steps=0), 12, AXES)
    exact = optimizers.make(config(name="adamw", warmup_steps=0), 12, AXES)
    grads = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    updates, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    expected, _ = exact.update(grads, exact.init(PARAMS), PARAMS)
    adam = optax.tree_utils.tree_get(state, "mu"), optax.tree_utils.tree_get(state, "nu")
    assert {x.dtype for x in jax.tree.leaves(adam[0])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(adam[1])} == {jnp.dtype(nu_dtype)}
    # The first step is computed before anything is rounded but the first moment.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), updates, expected)
