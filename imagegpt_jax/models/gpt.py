"""The decoder: a pre-norm GPT over one sequence of text and image tokens.

The model knows only sequences: what a token means, where it stands and which layout a picture has is the business of
`data/packing.py`. Every block choice is a key of `GPTConfig` (`gpt_config.py`).

Shapes: B batch, L length, S cache capacity, P prefix features, D model, K key/value heads,
H head dim, V vocabulary, E feature width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from imagegpt_jax.models import layers
from imagegpt_jax.models.attention import EMPTY, Cache, cache_mask, visible, write
from imagegpt_jax.models.blocks import Block, FeatureProjection, adapt, make_modulation, modulate
from imagegpt_jax.models.gpt_config import GPTConfig, check, split_dims
from imagegpt_jax.parallel import fsdp, sharding

EMBED_STD = 0.02
# What the backward pass finds saved of each block, beside its input; see `GPTConfig.remat`.
REMAT = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(fsdp.GATHERED),
    "full": None,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequence:
    """A batch of token sequences.

    Attributes:
      tokens: ids.
      positions: (t, row, column) of each token.
      segments: who attends to whom; 0 is padding, prefix features are of segment 1.
      target_positions: position of the token that each token predicts (with `config.target_positions`).
      features: a text encoder's output (with `config.feature_width`).
      feature_mask: which features are real; a row without any is unconditional, and gets the learned features.
      condition: token id that modulates adaptive norms, such as a class; the padding token for none.
    """

    tokens: Int[Array, "B L"]
    positions: Int[Array, "B L 3"]
    segments: Int[Array, "B L"]
    target_positions: Int[Array, "B L 3"] | None = None
    features: Float[Array, "B P E"] | None = None
    feature_mask: Bool[Array, "B P"] | None = None
    condition: Int[Array, " B"] | None = None

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> "Sequence":
        """Takes the fields it knows from a packed batch."""
        return cls(**{f.name: batch[f.name] for f in dataclasses.fields(cls) if f.name in batch})

    def first(self, length: int) -> "Sequence":
        """The same sequences, cut off after `length` tokens."""
        names = ("tokens", "positions", "segments", "target_positions")
        values = {name: getattr(self, name) for name in names}
        return dataclasses.replace(self, **{k: None if v is None else v[:, :length] for k, v in values.items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What the decoder returns.

    Attributes:
      hidden: final normed states of the tokens (prefix features are dropped).
      logits: fp32 scores of the next token over the vocabulary (its first `head_size` ids). Under jit they cost nothing
        where unused: `GPT.unembed` scores a part of the vocabulary at a part of the positions.
      cache: the cache with the tokens added, if one was given.
    """

    hidden: Float[Array, "B L D"]
    logits: Float[Array, "B L V"]
    cache: Cache | None = None


class GPT(nnx.Module):
    """The decoder. Its blocks are one stacked module: every block parameter has a leading axis of layers."""

    def __init__(self, config: GPTConfig, *, key: jax.Array):
        keys = jax.random.split(key, 6)
        kinds: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.config = config
        self.embed = layers.Embedding(config.vocab_size, config.width, key=keys[0], std=EMBED_STD, **kinds)
        if config.tie_embeddings:
            self.head = nnx.data(None)
        else:
            rows = config.head_size or config.vocab_size
            self.head = layers.Embedding(rows, config.width, key=keys[1], std=EMBED_STD, **kinds)
        if config.position == "learned":
            shape = (3, config.max_length + config.feature_length, config.width)
            table = EMBED_STD * jax.random.normal(keys[2], shape, layers.as_dtype(config.param_dtype))
            self.position = nnx.Param(table, axes=(None, None, "embed"))
        if config.feature_width:
            self.features = FeatureProjection(config, key=keys[3])
        if config.target_positions:
            self.target = layers.Linear(
                config.width, config.width, key=keys[4], axes=(None, "embed"), std=EMBED_STD, **kinds
            )
        self.blocks = jax.vmap(lambda k: Block(config, key=k))(jax.random.split(keys[5], config.depth))
        self.norm = layers.make_norm(
            config.norm, config.width, eps=config.norm_eps, bias=config.bias, param_dtype=config.param_dtype
        )
        self.modulation = make_modulation(config, 2) if config.conditioning == "adaptive_norm" else None

    # ------------------------------------------------------------------------------------------------ public calls

    def __call__(
        self, sequence: Sequence, cache: Cache | None = None, *, key: jax.Array | None = None, alone: int = 0
    ) -> Output:
        """Runs the decoder.

        Args:
          sequence: tokens, or with a cache the tokens that follow those in it.
          cache: what `init_cache` or an earlier call returned; it must have room for the tokens.
          key: turns dropout on; one key, or one for each row.
          alone: with a cache, so many of the last tokens do not see one another.

        Raises:
          UserError: if the sequence has fields the config does not provide for, or lacks some that it needs.
        """
        self._check(sequence, cache)
        x_BLD, rotary, segments_BL, condition_BD = self._embed(sequence)
        embed_keys, block_keys = (None, None) if key is None else _row_keys(key, x_BLD.shape[0])
        x_BLD = layers.dropout(x_BLD, self.config.token_dropout, embed_keys)
        x_BLD = sharding.constrain(x_BLD, ("batch", "length", "residual"))
        if cache is None:
            x_BLD = self._run(x_BLD, rotary, visible(segments_BL, self.config), condition_BD, block_keys)
        else:
            x_BLD, cache = self._run_cached(x_BLD, rotary, segments_BL, condition_BD, cache, alone)
        hidden_BLD = self.norm(x_BLD[:, x_BLD.shape[1] - sequence.tokens.shape[1] :])
        if self.modulation is not None and condition_BD is not None:
            hidden_BLD = adapt(hidden_BLD, *modulate(self.modulation, condition_BD, 2))
        return Output(hidden_BLD, self.unembed(hidden_BLD), cache)

    @property
    def output_head(self) -> layers.Embedding:
        """The table that final states are scored against: the tokens' own if they are tied."""
        return self.embed if self.head is None else self.head

    def output_table(self, start: int = 0, size: int | None = None) -> Float[Array, "V D"]:
        """Rows of the output head for ids `start : start + size` (`None`: to the end)."""
        return self.output_head.rows(start, size)

    def unembed(self, hidden: Float[Array, "*_ D"], start: int = 0, size: int | None = None) -> Float[Array, "*_ V"]:
        """fp32 logits of ids `start : start + size` (`None`: to the end) from final states."""
        logits = layers.score(hidden, self.output_table(start, size))
        return sharding.constrain(logits, ("batch", *("length",) * (logits.ndim - 2), "vocab"))

    def logits(self, ids_BL: Int[Array, "B L"], *, key: jax.Array | None = None) -> Float[Array, "B L V"]:
        """Next-token logits of plain ids: token i is at position (i, i, i), all of one segment."""
        return self(plain_sequence(ids_BL), key=key).logits

    def init_cache(self, batch: int, length: int, *, per_row: bool = False) -> Cache:
        """An empty cache of `length` slots per row; `per_row` keeps a length for every row (see `Cache`)."""
        config = self.config
        shape = (batch, config.num_kv_heads, length, config.head_width)
        arrays = [jnp.zeros(shape, layers.as_dtype(config.dtype)) for _ in range(2 * config.depth)]
        return Cache(
            keys=tuple(arrays[: config.depth]),
            values=tuple(arrays[config.depth :]),
            segments_BS=jnp.full((batch, length), EMPTY, jnp.int32),
            length=jnp.zeros((batch,) if per_row else (), jnp.int32),
        )

    def unstack(self) -> "GPT":
        """The same decoder with its blocks in a list: made once before a decoding loop, it keeps the loop from cutting
        every layer's parameters out of the stacked ones at each step. It has no use for `scan`."""
        gpt = jax.tree.map(lambda x: x, self)
        gpt.blocks = nnx.List(unstack(self.blocks, self.config.depth))
        return gpt

    # ------------------------------------------------------------------------------------------------------- parts

    def _check(self, sequence: Sequence, cache: Cache | None) -> None:
        config = self.config
        batch, length = sequence.tokens.shape
        check(
            (sequence.target_positions is not None) == config.target_positions,
            "target positions come with target_positions=True, and only then",
        )
        if sequence.features is not None:
            check(config.feature_width > 0, "the sequence has features, so feature_width must not be 0")
            shape = (batch, config.feature_length, config.feature_width)
            check(
                sequence.features.shape == shape and sequence.feature_mask is not None,
                f"features must be {shape} with a mask, and are {sequence.features.shape}",
            )
        if config.conditioning == "adaptive_norm":
            check(
                sequence.condition is not None or sequence.features is not None,
                "conditioning='adaptive_norm' needs Sequence.condition or features",
            )
        prefix = 0 if sequence.features is None or config.conditioning != "prefix" else config.feature_length
        if cache is not None:
            check(
                length + prefix <= cache.capacity,
                f"{length + prefix} tokens do not fit a cache of {cache.capacity} slots",
            )

    def _embed(self, sequence: Sequence) -> tuple[jax.Array, Any, Int[Array, "B L"], jax.Array | None]:
        """Tokens and prefix -> stream, rotary table, segments, condition."""
        config = self.config
        positions_BL3, segments_BL = sequence.positions, sequence.segments
        x_BLD = self._look_up(sequence.tokens)
        if sequence.target_positions is not None:
            cos_BLD, sin_BLD = layers.rotary_table(
                sequence.target_positions,
                split_dims(config.width),
                config.width,
                config.rope_theta,
                layers.accumulation_dtype(x_BLD.dtype),
            )
            x_BLD = x_BLD + self.target(jnp.concatenate([cos_BLD, sin_BLD], axis=-1))
        condition_BD = None
        if config.conditioning == "adaptive_norm" and sequence.condition is not None:
            # Embeddings start small, as suits a residual stream; a condition starts with unit variance.
            condition_BD = self.embed(sequence.condition) / EMBED_STD
        if sequence.features is not None and sequence.feature_mask is not None:
            features_BPD, mask_BP = self.features(sequence.features, sequence.feature_mask)
            if config.conditioning == "prefix":
                if config.feature_begins:
                    x_BLD = jnp.concatenate([features_BPD[:, -1:], x_BLD[:, 1:]], axis=1)
                    features_BPD, mask_BP = features_BPD[:, :-1], mask_BP[:, :-1]
                x_BLD = jnp.concatenate([features_BPD, x_BLD], axis=1)
                # Feature i stands at i - P, so that the first token is at 0 with or without features.
                before_P = jnp.arange(-mask_BP.shape[1], 0, dtype=positions_BL3.dtype)
                before_BP3 = jnp.broadcast_to(before_P[:, None], (*mask_BP.shape, 3))
                positions_BL3 = jnp.concatenate([before_BP3, positions_BL3], axis=1)
                segments_BL = jnp.concatenate([mask_BP.astype(segments_BL.dtype), segments_BL], axis=1)
            else:
                weight_BP1 = mask_BP[..., None] / jnp.sum(mask_BP, axis=1)[:, None, None]
                pooled_BD = jnp.sum(features_BPD * weight_BP1.astype(features_BPD.dtype), axis=1)
                condition_BD = pooled_BD if condition_BD is None else condition_BD + pooled_BD
        if config.position == "rope":
            rotary = layers.rotary_table(
                positions_BL3,
                config.rotary_axes,
                config.head_width,
                config.rope_theta,
                layers.accumulation_dtype(x_BLD.dtype),
                config.rope_scaling,
            )
            if config.rope_zero_prefix:
                rotary = tuple(jnp.where(positions_BL3[..., :1] > 0, table, 0) for table in rotary)
            return x_BLD, rotary, segments_BL, condition_BD
        index_BL3 = positions_BL3 + config.feature_length
        for axis in range(3):
            x_BLD = x_BLD + self.position[axis].at[index_BL3[..., axis]].get(mode="clip").astype(x_BLD.dtype)
        return x_BLD, None, segments_BL, condition_BD

    def _look_up(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        def rows(tokens_BL, embed, batch, gather):
            return gather(embed).stream(tokens_BL)

        return fsdp.run(rows, tokens_BL, self.embed, None, layers.as_dtype(self.config.dtype))

    def _run(self, x_BLD, rotary, seen, condition_BD, keys_B) -> Float[Array, "B L D"]:
        """All blocks, without a cache."""
        config = self.config

        def blocks_of_rows(x_BLD, blocks, batch, gather):
            rotary, seen, condition_BD, keys_B = batch

            def apply(x_BLD, index, block):
                keys = None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
                return gather(block)(x_BLD, rotary, seen, condition_BD, key=keys, layer=index)[0]

            if config.remat != "none" or gather is not fsdp.keep:
                apply = jax.checkpoint(apply, policy=REMAT[config.remat], prevent_cse=not config.scan)
            if config.scan:
                layers_ = (jnp.arange(config.depth), blocks)
                return jax.lax.scan(lambda x, layer: (apply(x, *layer), None), x_BLD, layers_)[0]
            for i, block in enumerate(unstack(blocks, config.depth)):
                x_BLD = apply(x_BLD, i, block)
            return x_BLD

        batch = (rotary, seen, condition_BD, keys_B)
        return fsdp.run(blocks_of_rows, x_BLD, self.blocks, batch, layers.as_dtype(config.dtype), columns=True)

    def _run_cached(
        self, x_BLD, rotary, segments_BL, condition_BD, cache: Cache, alone: int
    ) -> tuple[jax.Array, Cache]:
        """All blocks, unrolled: scanning would copy the whole cache twice per step."""
        length = cache.length
        segments_BS = write(cache.segments_BS[..., None], segments_BL[..., None], length)[..., 0]
        cache = dataclasses.replace(cache, segments_BS=segments_BS)
        mask_BLS = cache_mask(cache, segments_BL, alone)
        pairs = []
        blocks = unstack(self.blocks, self.config.depth)
        for i, (block, keys, values) in enumerate(zip(blocks, cache.keys, cache.values, strict=True)):
            x_BLD, pair = block(x_BLD, rotary, mask_BLS, condition_BD, (keys, values), length, layer=i)
            pairs.append(pair)
        keys, values = zip(*pairs, strict=True)
        return x_BLD, Cache(keys, values, segments_BS, length + x_BLD.shape[1])


def _row_keys(key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """Keys for the dropout of embeddings and of blocks, one for each row: draws then do not depend on who holds it."""
    keys_B = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    pairs_B2 = jax.vmap(jax.random.split)(keys_B)
    return pairs_B2[:, 0], pairs_B2[:, 1]


def unstack(blocks: Any, depth: int) -> list[Block]:
    """Stacked blocks one by one. The gradient of the split is one concatenation, not a sum of padded slices."""
    if isinstance(blocks, nnx.List):
        return list(blocks)
    parts = jax.tree.map(lambda x: jax.lax.split(x, (1,) * depth), blocks)
    leaves, treedef = jax.tree.flatten(blocks)
    columns = zip(*treedef.flatten_up_to(parts), strict=True) if leaves else ()
    return [jax.tree.unflatten(treedef, [x[0] for x in column]) for column in columns]


def plain_sequence(ids_BL: Int[Array, "B L"]) -> Sequence:
    """A sequence of plain ids: token i at position (i, i, i), all of segment 1."""
    positions_L = jnp.arange(ids_BL.shape[1], dtype=jnp.int32)
    return Sequence(
        tokens=ids_BL,
        positions=jnp.broadcast_to(positions_L[None, :, None], (*ids_BL.shape, 3)),
        segments=jnp.ones(ids_BL.shape, jnp.int32),
    )
