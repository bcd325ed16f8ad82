"""The decoder: its choices, its masks, its cache, its sizes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax import train_state
from imagegpt_jax.data.packing import IMAGE_TO_TEXT, Layout, TokenSpace
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.attention import Cache
from imagegpt_jax.models.gpt import GPT, GPTConfig, Output, Sequence

SPACE = TokenSpace(text_vocab=20, num_classes=3, num_codes=30)
LAYOUT = Layout(space=SPACE, text_length=5, grid=(2, 3))
SMALL = {"vocab_size": SPACE.vocab_size, "width": 32, "depth": 2, "heads": 4, "mlp_width": 48}
VARIANTS = {
    "default": {},
    "grouped": {"kv_heads": 2, "head_dim": 16, "qk_norm": True},
    "gpt2": {"norm": "layer", "mlp": "gelu", "bias": True, "position": "learned", "max_length": 20},
    "tied": {"tie_embeddings": True, "rotary_dims": (8, 0, 0)},
    "adaptive": {"conditioning": "adaptive_norm"},
    "prefix": {"feature_width": 12, "feature_length": 4},
    "learned_prefix": {"feature_width": 12, "feature_length": 4, "position": "learned", "max_length": 20},
    "adaptive_features": {"feature_width": 12, "feature_length": 4, "conditioning": "adaptive_norm"},
    "any_order": {"target_positions": True},
}


def make(seed: int = 0, **kwargs) -> GPT:
    """A decoder of random numbers: what starts at zero or one is moved too, so that a test sees whether it is used."""
    config = GPTConfig(**(SMALL | kwargs))
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda key: GPT(config, key=key), jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for x in leaves])


def initial(config: GPTConfig) -> GPT:
    """A decoder as training starts it."""
    return jax.jit(lambda key: GPT(config, key=key))(jax.random.key(0))


def batch(config: GPTConfig, layout: Layout = LAYOUT, **replace) -> Sequence:
    layout = dataclasses.replace(layout, target_positions=config.target_positions)
    packed = layout.pack([[1, 2, 3], [], [4] * 9], [-1, 2, 1], np.arange(18).reshape(3, 6), [0, 0, IMAGE_TO_TEXT])
    if config.feature_width:
        packed["features"] = np.random.default_rng(0).normal(size=(3, 4, 12)).astype(np.float32)
        packed["feature_mask"] = np.array([[0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    return dataclasses.replace(Sequence.from_batch(packed), **replace)


@jax.jit
def forward(gpt: GPT, sequence: Sequence) -> jax.Array:
    return gpt(sequence).logits


@jax.jit
def forward_cached(gpt: GPT, sequence: Sequence, cache: Cache) -> Output:
    return gpt(sequence, cache)


@jax.jit
def forward_dropout(gpt: GPT, sequence: Sequence, key: jax.Array) -> jax.Array:
    return gpt(sequence, key=key).logits


# ------------------------------------------------------------------------------------------------------- the forward


@pytest.mark.parametrize("name", VARIANTS)
def test_cache_equals_full_run(name):
    """A prompt and then one token at a time, through the cache, give what one full run gives."""
    gpt = make(**VARIANTS[name])
    sequence = batch(gpt.config)
    full = forward(gpt, sequence)
    cuts = [0, *range(6, LAYOUT.length + 1)]
    for per_row in (False, True) if name in ("default", "prefix") else (False,):
        cache = gpt.init_cache(3, LAYOUT.length + gpt.config.feature_length + 3, per_row=per_row)
        pieces = []
        for a, b in itertools.pairwise(cuts):
            part = {k: getattr(sequence, k)[:, a:b] for k in ("tokens", "positions", "segments")}
            if sequence.target_positions is not None:
                part["target_positions"] = sequence.target_positions[:, a:b]
            if a and gpt.config.conditioning == "prefix":
                part |= {"features": None, "feature_mask": None}
            output = forward_cached(gpt, dataclasses.replace(sequence, **part), cache)
            cache = output.cache
            pieces.append(output.logits)
        np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_never_reaches_real_tokens(name):
    gpt = make(**VARIANTS[name])
    sequence = batch(gpt.config)
    pad = sequence.segments == 0
    assert pad.sum() > 3
    other = dataclasses.replace(
        sequence,
        tokens=np.where(pad, 11, sequence.tokens),
        positions=np.where(pad[..., None], 9, sequence.positions),
    )
    a, b = forward(gpt, sequence), forward(gpt, other)
    np.testing.assert_array_equal(a[~pad], b[~pad])
    assert not np.allclose(a[pad], b[pad])
    assert np.isfinite(a).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_later_tokens_never_reach_earlier_ones(name):
    gpt = make(**VARIANTS[name])
    sequence = batch(gpt.config)
    tokens = sequence.tokens.copy()
    tokens[:, 8] = (tokens[:, 8] + 1) % SPACE.vocab_size
    a, b = forward(gpt, sequence), forward(gpt, dataclasses.replace(sequence, tokens=tokens))
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert (np.abs(a[:, 9:] - b[:, 9:]).max(axis=(1, 2)) > 1e-4).all()


def test_dropping_the_text_equals_an_unconditional_sequence():
    gpt = make()
    codes = np.arange(6)[None]
    dropped = LAYOUT.pack([[1, 2, 3]], [2], codes, drops_B=[True])
    nothing = LAYOUT.pack([[]], [-1], codes)
    kept = LAYOUT.pack([[1, 2, 3]], [2], codes)
    # ... and one without any text region at all.
    alone = Layout(space=SPACE, text_length=1, grid=(2, 3)).pack([[]], None, codes)
    logits = [forward(gpt, Sequence.from_batch(b))[:, -8:] for b in (dropped, nothing, kept, alone)]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_allclose(logits[0], logits[3], atol=1e-5)
    assert np.abs(logits[0] - logits[2]).max() > 1e-3


@functools.cache
def gradient(**kwargs):
    """(program text, gradient) of a loss with dropout."""
    gpt = make(mlp_dropout=0.1, **kwargs)
    sequence = batch(gpt.config)

    def loss(gpt):
        return jnp.mean(jax.nn.logsumexp(gpt(sequence, key=jax.random.key(0)).logits, axis=-1) ** 2)

    lowered = jax.jit(jax.grad(loss)).lower(gpt)
    return lowered.as_text(), lowered.compile()(gpt)


@pytest.mark.parametrize(
    "other", [{"scan": False}, {"remat": "full"}, {"remat": "dots"}, {"remat": "full", "scan": False}]
)
def test_scan_and_remat_change_the_program_and_no_gradient(other):
    program, base = gradient()
    changed_program, changed = gradient(**other)
    assert program != changed_program
    for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(changed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_trained(name):
    """Each one has a gradient."""
    gpt = make(**VARIANTS[name])
    sequence = batch(gpt.config)
    weights = jax.random.normal(jax.random.key(5), (*sequence.tokens.shape, SPACE.vocab_size))
    gradients = jax.jit(jax.grad(lambda gpt: jnp.sum(gpt(sequence).logits * weights)))(gpt)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["token_dropout", "residual_dropout", "mlp_dropout", "attention_dropout"])
def test_dropout_needs_a_key_and_depends_on_it(name):
    gpt = make(**{name: 0.5})
    sequence = batch(gpt.config)
    plain = forward(make(), sequence)
    np.testing.assert_allclose(forward(gpt, sequence), plain, atol=1e-6)
    a, b, c = (forward_dropout(gpt, sequence, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    assert np.abs(a - plain).max() > 1e-3


def test_plain_logits_and_a_part_of_the_head():
    gpt = make()
    ids = jnp.array([[1, 2, 3, 4]])
    logits = jax.jit(lambda gpt, ids: gpt.logits(ids))(gpt, ids)
    assert logits.shape == (1, 4, SPACE.vocab_size)
    assert logits.dtype == jnp.float32
    text = LAYOUT.pack([[1, 2, 3, 4]], None, np.zeros((1, 6), int))
    np.testing.assert_allclose(logits, forward(gpt, Sequence.from_batch(text))[:, :4], atol=1e-5)
    hidden = gpt(Sequence.from_batch(text)).hidden
    np.testing.assert_allclose(gpt.unembed(hidden, 3, 4), gpt.unembed(hidden)[..., 3:7], atol=1e-6)


def test_bfloat16_keeps_fp32_parameters_and_logits():
    gpt = make(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(gpt)} == {jnp.dtype("float32")}
    logits = forward(gpt, batch(gpt.config))
    assert logits.dtype == jnp.float32
    exact = forward(make(), batch(gpt.config))
    assert 0 < float(jnp.abs(logits - exact).max()) < 0.05 * float(jnp.abs(exact).max())


def test_rows_without_features_get_the_learned_ones():
    gpt = make(**VARIANTS["prefix"])
    sequence = batch(gpt.config)
    other = dataclasses.replace(sequence, features=sequence.features + 1.0)
    a, b = forward(gpt, sequence), forward(gpt, other)
    np.testing.assert_array_equal(a[1], b[1])
    assert np.abs(a[0] - b[0]).max() > 1e-3
    # A masked feature is padding.
    masked = sequence.features.copy()
    masked[0, 0] += 7.0
    real = sequence.segments == 1
    np.testing.assert_array_equal(a[real], forward(gpt, dataclasses.replace(sequence, features=masked))[real])


def test_condition_matters_and_starts_as_identity():
    sequence = batch(GPTConfig(**SMALL))
    other = dataclasses.replace(sequence, condition=(sequence.condition + 1) % SPACE.vocab_size)
    fresh = initial(GPTConfig(**SMALL, conditioning="adaptive_norm"))
    np.testing.assert_array_equal(forward(fresh, sequence), forward(fresh, other))
    trained = make(conditioning="adaptive_norm")
    assert np.abs(forward(trained, sequence) - forward(trained, other)).max() > 1e-3


def test_unstacked_decoder_is_the_same_one():
    gpt = make()
    listed = gpt.unstack()
    assert len(listed.blocks) == 2
    assert gpt.blocks.mlp.up.weight.shape[0] == 2, "the original is untouched"
    sequence = batch(gpt.config)
    a = forward_cached(gpt, sequence, gpt.init_cache(3, LAYOUT.length)).logits
    b = forward_cached(listed, sequence, gpt.init_cache(3, LAYOUT.length)).logits
    np.testing.assert_allclose(a, b, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- parameters

LLAMAGEN = {  # depth, heads, width, mlp width, parameters as published (GPT-B ... GPT-3B)
    "B": (12, 12, 768, 2048, 111e6),
    "L": (24, 16, 1024, 2816, 343e6),
    "XL": (36, 20, 1280, 3584, 775e6),
    "XXL": (48, 24, 1536, 4096, 1.4e9),
    "3B": (24, 32, 3200, 8704, 3.1e9),
}


@pytest.mark.parametrize("size", LLAMAGEN)
def test_parameter_counts_at_published_shapes(size):
    """LlamaGen's parameters (blocks, norm, 16384 codes twice, 1001 classes), and exactly what one token space adds."""
    depth, heads, width, mlp_width, published = LLAMAGEN[size]
    space = TokenSpace(text_vocab=0, num_classes=1000, num_codes=16384)
    config = GPTConfig(vocab_size=space.vocab_size, width=width, depth=depth, heads=heads, mlp_width=mlp_width)
    gpt = jax.eval_shape(lambda key: GPT(config, key=key), jax.random.key(0))
    count = train_state.count_params(gpt)
    block = 4 * width**2 + 3 * width * mlp_width + 2 * width
    theirs = depth * block + width + (2 * 16384 + 1001) * width
    # One more special token than their "no class" row to embed, and a head row for every class and special token.
    ours_more = (4 - 1) * width + 1004 * width
    assert count == theirs + ours_more
    assert theirs == pytest.approx(published, rel=0.02)
    assert count == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_names_its_axes(name):
    """One name for each dimension; stacked parameters have the axis of layers besides."""
    net = train_state.network(lambda key: GPT(GPTConfig(**(SMALL | VARIANTS[name])), key=key))
    axes = dict(jax.tree_util.tree_leaves_with_path(net.axes, is_leaf=lambda x: isinstance(x, tuple)))
    shapes = dict(jax.tree_util.tree_leaves_with_path(train_state.split(net.abstract)[1]))
    assert axes.keys() == shapes.keys()
    for path, names in axes.items():
        stacked = "blocks" in jax.tree_util.keystr(path)
        assert len(names) + stacked == shapes[path].ndim, path
        assert any(names) or len(names) == 1 or min(shapes[path].shape) <= 12, f"{path} cannot be sharded"


def test_initial_loss_is_near_uniform():
    gpt = initial(GPTConfig(**SMALL))
    packed = LAYOUT.pack([[1, 2, 3]] * 8, None, np.random.default_rng(0).integers(0, 30, (8, 6)))
    log_probs = jax.nn.log_softmax(forward(gpt, Sequence.from_batch(packed)))
    loss = -jnp.take_along_axis(log_probs, packed["targets"][..., None], axis=-1)[packed["weights"] > 0].mean()
    assert float(loss) == pytest.approx(np.log(SPACE.vocab_size), rel=0.03)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"heads": 5}, "does not divide"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"norm": "rmz"}, "Did you mean 'rms'"),
        ({"mlp": "relu"}, "mlp='relu'"),
        ({"position": "rop"}, "Did you mean 'rope'"),
        ({"rotary_dims": (4, 4)}, "rotary_dims"),
        ({"rotary_dims": (4, 4, 4)}, "rotary_dims"),
        ({"rotary_dims": (3, 3, 2)}, "rotary_dims"),
        ({"position": "learned"}, "max_length"),
        ({"feature_width": 3}, "feature_length"),
        ({"mlp_dropout": 1.0}, "mlp_dropout"),
        ({"depth": 0}, "depth"),
        ({"dtype": "half"}, "dtype"),
        ({"remat": "some"}, "remat"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_impossible_configs_say_what_is_wrong(kwargs, words):
    with pytest.raises(UserError, match=words):
        GPTConfig(**(SMALL | kwargs))


def test_sequences_that_do_not_fit_the_config():
    plain, adaptive = make(), make(conditioning="adaptive_norm")
    sequence = batch(plain.config)
    with pytest.raises(UserError, match="target_positions"):
        plain(dataclasses.replace(sequence, target_positions=sequence.positions))
    with pytest.raises(UserError, match="feature_width"):
        plain(dataclasses.replace(sequence, features=np.zeros((3, 4, 12)), feature_mask=np.ones((3, 4), bool)))
    with pytest.raises(UserError, match="condition"):
        adaptive(dataclasses.replace(sequence, condition=None))
    with pytest.raises(UserError, match="do not fit a cache of 4"):
        plain(sequence, plain.init_cache(3, 4))
