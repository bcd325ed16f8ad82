"""The parts of the decoder between its embedding and its head: mlp, block, modulation, projection of prefix features.

Shapes: B batch, L length, S cache capacity, P prefix features, D model, F mlp, E feature width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from imagegpt_jax.models import layers
from imagegpt_jax.models.attention import Attention, LayerCache, Visible
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.parallel import manual_collectives, sharding
from imagegpt_jax.parallel.manual_collectives import STREAM


class MLP(nnx.Module):
    """Feed-forward part of a block: SwiGLU, or GELU with one hidden layer; both with another activation if asked."""

    def __init__(self, config: GPTConfig, *, key: jax.Array):
        up_key, gate_key, down_key = jax.random.split(key, 3)
        shared: dict[str, Any] = {
            "bias": config.bias or config.mlp_bias,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
        }
        width, mlp_width = config.width, config.mlp_width
        self.activation = config.activation or ("silu" if config.mlp == "swiglu" else "gelu_tanh")
        std = layers.fan_in_std(mlp_width) * config.residual_scale
        self.up = layers.Linear(width, mlp_width, key=up_key, axes=("embed", "mlp"), **shared)
        if config.mlp == "swiglu":
            self.gate = layers.Linear(width, mlp_width, key=gate_key, axes=("embed", "mlp"), **shared)
        else:
            self.gate = nnx.data(None)
        self.down = layers.Linear(mlp_width, width, key=down_key, axes=("mlp", "embed"), std=std, **shared)

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the mlp, before the residual."""
        activation = layers.ACTIVATIONS[self.activation]
        up_BLF = self.up(x_BLD)
        hidden_BLF = activation(up_BLF) if self.gate is None else activation(self.gate(x_BLD)) * up_BLF
        return self.down(sharding.constrain(hidden_BLF, ("batch", "length", "mlp")))


class Block(nnx.Module):
    """Norm, attention, residual; norm, mlp, residual; with adaptive norm also shifts, scales and gates from c."""

    def __init__(self, config: GPTConfig, *, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        norm: dict[str, Any] = {"eps": config.norm_eps, "bias": config.bias, "param_dtype": config.param_dtype}
        self.config = config
        self.attention_norm = layers.make_norm(config.norm, config.width, **norm)
        self.attention = Attention(config, key=attention_key)
        self.mlp_norm = layers.make_norm(config.norm, config.width, **norm)
        self.mlp = MLP(config, key=mlp_key)
        self.modulation = make_modulation(config, 6) if config.conditioning == "adaptive_norm" else None

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        rotary: tuple[jax.Array, jax.Array] | None,
        visible: Visible,
        condition_BD: Float[Array, "B D"] | None,
        cache: LayerCache | None = None,
        length: Int[Array, "*B"] | None = None,
        key: jax.Array | None = None,
        layer: jax.Array | int = 0,
    ) -> tuple[Float[Array, "B L D"], LayerCache | None]:
        """Returns the new residual stream and the layer's new cache."""
        config = self.config
        keys = (None,) * 3 if key is None else tuple(jax.vmap(lambda k: jax.random.split(k, 3))(key).T)
        if self.modulation is None or condition_BD is None:
            shift1 = scale1 = gate1 = shift2 = scale2 = gate2 = None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulate(self.modulation, condition_BD, 6)
        # Where `tensor` is written out, branches give parts of sums, of which dropout and gates are linear functions.
        x_BLD = manual_collectives.gather_columns(x_BLD)
        h_BLD = _whole(adapt(self.attention_norm(x_BLD), shift1, scale1))
        y_BLD, cache = self.attention(h_BLD, rotary, visible, cache, length, keys[0], layer)
        y_BLD = sharding.constrain(y_BLD, STREAM)
        y_BLD = gated(layers.dropout(y_BLD, config.residual_dropout, keys[1]), gate1)
        x_BLD = x_BLD + manual_collectives.sum_parts(y_BLD)
        h_BLD = _whole(adapt(self.mlp_norm(x_BLD), shift2, scale2))
        y_BLD = sharding.constrain(self.mlp(h_BLD), STREAM)
        y_BLD = gated(layers.dropout(y_BLD, config.mlp_dropout, keys[2]), gate2)
        x_BLD = manual_collectives.own_columns(x_BLD) + manual_collectives.sum_to_own_columns(y_BLD)
        return sharding.constrain(x_BLD, STREAM), cache


def _whole(x_BLD: jax.Array) -> jax.Array:
    """Gathers the columns of a normed stream once, for all matrices that are to read it."""
    return sharding.constrain(x_BLD, ("batch", "length", None))


def make_modulation(config: GPTConfig, parts: int) -> layers.Linear:
    """The map from a condition to `parts` modulations; it starts at zero, so that a gated block starts as identity."""
    return layers.Linear(
        config.width,
        parts * config.width,
        key=jax.random.key(0),
        axes=("embed", None),
        bias=True,
        std=0.0,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
    )


def modulate(linear: layers.Linear, condition_BD: jax.Array, parts: int) -> list[Float[Array, "B 1 D"]]:
    """Modulations of a condition."""
    return jnp.split(linear(jax.nn.silu(condition_BD))[:, None], parts, axis=-1)


def adapt(x_BLD: jax.Array, shift: jax.Array | None, scale: jax.Array | None) -> Float[Array, "B L D"]:
    """Shifts and scales a normed stream, if there is a condition."""
    return x_BLD if shift is None or scale is None else x_BLD * (1 + scale) + shift


def gated(x_BLD: jax.Array, gate: jax.Array | None) -> Float[Array, "B L D"]:
    """Gates a branch, if there is a condition."""
    return x_BLD if gate is None else x_BLD * gate


class FeatureProjection(nnx.Module):
    """A text encoder's features -> model width (two layers, as in LlamaGen), with learned features for "no text"."""

    def __init__(self, config: GPTConfig, *, key: jax.Array):
        in_key, out_key, none_key = jax.random.split(key, 3)
        kinds: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.fc1 = layers.Linear(config.feature_width, config.width, key=in_key, axes=(None, "embed"), **kinds)
        self.fc2 = layers.Linear(config.width, config.width, key=out_key, axes=("embed", None), **kinds)
        shape = (config.feature_length, config.feature_width)
        none_PE = layers.fan_in_std(config.feature_width) * jax.random.normal(none_key, shape)
        self.unconditional = nnx.Param(none_PE.astype(layers.as_dtype(config.param_dtype)), axes=(None, None))

    def __call__(
        self, features_BPE: Float[Array, "B P E"], mask_BP: Bool[Array, "B P"]
    ) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
        """Projected features and their mask; rows without a single real feature become the learned ones."""
        absent_B1 = ~jnp.any(mask_BP, axis=1, keepdims=True)
        none_PE = self.unconditional[...].astype(features_BPE.dtype)
        features_BPE = jnp.where(absent_B1[..., None], none_PE, features_BPE)
        return self.fc2(jax.nn.gelu(self.fc1(features_BPE), approximate=True)), mask_BP | absent_B1
