"""The decoder against PyTorch references at random small weights: Llama and GPT-2 of `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.models.gpt import GPT, GPTConfig

pytestmark = pytest.mark.parity

IDS = np.random.default_rng(0).integers(0, 50, (2, 11))


def build(config: GPTConfig, tensors: dict[str, list[np.ndarray] | np.ndarray]) -> GPT:
    """Puts tensors (a list: one per block) into a decoder; every parameter must be given, and have the right shape."""
    gpt = jax.eval_shape(lambda key: GPT(config, key=key), jax.random.key(0))
    paths, treedef = jax.tree_util.tree_flatten_with_path(gpt)
    names = ["/".join(getattr(k, "name", str(getattr(k, "key", k))) for k in path) for path, _ in paths]
    names = [n.removesuffix("/value") for n in names]
    assert sorted(names) == sorted(tensors), set(names) ^ set(tensors)
    leaves = []
    for name, (_, leaf) in zip(names, paths, strict=True):
        value = tensors[name]
        value = np.stack(value) if isinstance(value, list) else value
        assert value.shape == leaf.shape, (name, value.shape, leaf.shape)
        leaves.append(jnp.asarray(value))
    return jax.tree_util.tree_unflatten(treedef, leaves)


def randomize(torch, model):
    """Random weights, biases and norm scales: what starts at zero or one would hide a wrong mapping."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p))
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}, model.eval()


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, False), (2, False), (1, True)])
def test_llama(kv_heads, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    w, reference = randomize(torch, reference)
    config = GPTConfig(
        vocab_size=50,
        width=32,
        depth=3,
        heads=4,
        kv_heads=kv_heads,
        mlp_width=40,
        rotary_dims=(8, 0, 0),  # 1-D, in the same "rotate half" layout
        tie_embeddings=tied,
    )

    def each(name: str) -> list[np.ndarray]:
        return [w[f"model.layers.{i}.{name}.weight"].T for i in range(3)]

    gpt = build(
        config,
        {
            "embed/weight": w["model.embed_tokens.weight"],
            **({} if tied else {"head/weight": w["lm_head.weight"]}),
            "norm/scale": w["model.norm.weight"],
            "blocks/attention_norm/scale": each("input_layernorm"),
            "blocks/mlp_norm/scale": each("post_attention_layernorm"),
            "blocks/attention/query/weight": each("self_attn.q_proj"),
            "blocks/attention/key/weight": each("self_attn.k_proj"),
            "blocks/attention/value/weight": each("self_attn.v_proj"),
            "blocks/attention/out/weight": each("self_attn.o_proj"),
            "blocks/mlp/gate/weight": each("mlp.gate_proj"),
            "blocks/mlp/up/weight": each("mlp.up_proj"),
            "blocks/mlp/down/weight": each("mlp.down_proj"),
        },
    )
    with torch.no_grad():
        expected = reference(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(jax.jit(lambda g, x: g.logits(x))(gpt, jnp.asarray(IDS)), expected, atol=1e-4)


def test_gpt2():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=32, n_layer=3, n_head=4, attn_implementation="eager"
        )
    )
    w, reference = randomize(torch, reference)
    config = GPTConfig(
        vocab_size=50,
        width=32,
        depth=3,
        heads=4,
        mlp_width=128,
        norm="layer",
        mlp="gelu",
        bias=True,
        position="learned",
        max_length=16,
        tie_embeddings=True,
    )
    tensors = {
        "embed/weight": w["transformer.wte.weight"],
        # One table for each of t, row, column: plain text moves along all three, so two of them are zero.
        "position": np.stack([w["transformer.wpe.weight"], *[np.zeros((16, 32), np.float32)] * 2]),
        "norm/scale": w["transformer.ln_f.weight"],
        "norm/bias": w["transformer.ln_f.bias"],
    }
    blocks = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    for ours, theirs in blocks.items():
        tensors[f"blocks/{ours}/scale"] = [w[f"transformer.h.{i}.{theirs}.weight"] for i in range(3)]
        tensors[f"blocks/{ours}/bias"] = [w[f"transformer.h.{i}.{theirs}.bias"] for i in range(3)]
    # GPT-2 stores [in, out] as we do, with query, key and value side by side.
    for kind in ("weight", "bias"):
        fused = [np.split(w[f"transformer.h.{i}.attn.c_attn.{kind}"], 3, axis=-1) for i in range(3)]
        for j, name in enumerate(("query", "key", "value")):
            tensors[f"blocks/attention/{name}/{kind}"] = [f[j] for f in fused]
        for ours, theirs in {"attention/out": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}.items():
            tensors[f"blocks/{ours}/{kind}"] = [w[f"transformer.h.{i}.{theirs}.{kind}"] for i in range(3)]
    gpt = build(config, tensors)
    with torch.no_grad():
        expected = reference(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(jax.jit(lambda g, x: g.logits(x))(gpt, jnp.asarray(IDS)), expected, atol=1e-4)
