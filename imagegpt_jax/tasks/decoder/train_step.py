"""The decoder's training step: first state, loss, update, FLOPs.

Shapes: B batch, L sequence, M places of one kind, D model width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from imagegpt_jax import train_state
from imagegpt_jax.convert import reading
from imagegpt_jax.data import packing
from imagegpt_jax.losses import chunked_cross_entropy
from imagegpt_jax.models import flops, gpt, layers, vq
from imagegpt_jax.parallel import fsdp, manual_collectives
from imagegpt_jax.tasks.decoder.batches import take_places, target_parts, used_length
from imagegpt_jax.tasks.decoder.setup import Setup, encoder_params, tokenizer_params, trained_tokenizer
from imagegpt_jax.train_state import TrainState
from imagegpt_jax.training import optimizers, train_metrics, warm_start
from imagegpt_jax.training.grad_accumulation import accumulate


def step_flops(setup: Setup, phase: str, batch: Mapping[str, Any]) -> float:
    """Model FLOPs of a training step: three forward passes, and the encoding of images where the step does that.

    What a frozen text encoder computes is not counted.
    """
    del phase
    layout = setup.layout
    length = used_length(setup)
    scored = [(layout.image_ids[1], layout.num_codes)]
    if layout.text_length:
        scored.append((layout.text_ids[1], layout.text_length + 1))
    count = 3 * flops.decoder_forward(setup.model, batch["tokens"].shape[0], length, scored)
    return count + (encoding_flops(setup, batch["image"].shape) if "tokenizer" in setup.networks else 0.0)


def encoding_flops(setup: Setup, shape: Sequence[int]) -> float:
    """Model FLOPs of encoding images [B, H, W, C] of a shape, counted in its trace with plain convolutions."""
    count, *sides = shape
    plain = dataclasses.replace(setup.tokenizer.model, conv_impl="xla")
    network = train_state.network(lambda key: vq.VQModel(plain, key=key))

    def encode(params: train_state.Params, image_BHWC: jax.Array) -> jax.Array:
        module: Any = network.module(params)
        return module.encode_codes(image_BHWC)

    image = jax.ShapeDtypeStruct((1, *sides), jnp.float32)
    return count * flops.traced(encode, train_state.split(network.abstract)[1], image)


def forward_flops(setup: Setup, batch_size: int, length: int, scored: int, context: int = 0) -> float:
    """Model FLOPs of `length` tokens after `context` others, of which the last `scored` are scored as codes."""
    return flops.decoder_forward(setup.model, batch_size, length, [(setup.layout.image_ids[1], scored)], context)


def init_state(setup: Setup, key: jax.Array) -> TrainState:
    """The first TrainState; pure. An untrained tokenizer is drawn here, what is trained is read by `load_frozen`."""
    return train_state.init(
        setup.networks,
        setup.optimizers,
        {},
        key,
        frozen=setup.config.frozen,
        frozen_networks=("tokenizer", "encoder"),
        ema=("decoder",) if setup.config.ema_decay else (),
        phases=("train",),
    )


def check_frozen(setup: Setup) -> None:
    """Raises UserError if the run that `config.tokenizer` names has no checkpoint of its network."""
    source = trained_tokenizer(setup.config)
    if source and not reading.is_weights(source):
        generator = setup.tokenizer.networks["generator"]
        warm_start.check_network(source, "config.tokenizer", "generator", generator)


def load_frozen(setup: Setup, state: TrainState, layout: TrainState) -> TrainState:
    """Puts the parameters of the trained tokenizer and the text encoder into a new state."""
    read = {"tokenizer": tokenizer_params, "encoder": encoder_params}
    params = {name: load(setup, layout.frozen[name]) for name, load in read.items() if name in setup.networks}
    return dataclasses.replace(state, frozen={**state.frozen, **params}) if params else state


def token_nll(setup: Setup, module: Any, batch: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
    """Negative log-likelihood in nats of each target [B, L]; 0 where there is none.

    The kind of each target is known from its place, so each is scored among the ids of its own kind: an image code
    among the codebook, a word among everything else. Only the places of that kind are multiplied with that
    part of the table.
    """
    sequence = gpt.Sequence.from_batch(batch).first(used_length(setup))
    hidden_BLD = module(sequence, key=key).hidden
    places = {name: batch[name] for name in ("tokens", "targets", "kind")}

    def rows(hidden_BLD: jax.Array, head: Any, batch: dict[str, jax.Array], gather: fsdp.Gather) -> jax.Array:
        head = gather(head)
        nll_BL = jnp.zeros(batch["tokens"].shape, layers.accumulation_dtype(hidden_BLD.dtype))
        for kind, start, count, (first_id, num_ids) in target_parts(setup, batch["tokens"]):
            hidden_BMD, targets_BM, kind_BM = (
                take_places(x, start, count) for x in (hidden_BLD, batch["targets"], batch["kind"])
            )
            targets_BM = jnp.clip(targets_BM - first_id, 0, num_ids - 1)
            table_VD = head.rows(first_id, num_ids)
            nll_BM = chunked_cross_entropy.token_nll(hidden_BMD, table_VD, targets_BM, chunk=setup.config.logit_chunk)
            nll_BM = jnp.where(kind_BM == kind, nll_BM, 0.0)
            if isinstance(start, int):
                nll_BL = nll_BL.at[:, start : start + count].add(nll_BM)
            else:
                index_BM = start[:, None] + jnp.arange(count)
                nll_BL = jax.vmap(lambda row, index, nll: row.at[index].add(nll))(nll_BL, index_BM, nll_BM)
        return nll_BL

    dtype = layers.as_dtype(setup.model.dtype)
    return fsdp.run(rows, hidden_BLD, module.output_head, places, dtype, whole_columns=True)


def train_step(setup: Setup, phase: str, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Any]:
    """One optimizer step on packed sequences, see `data/packing.py`."""
    del phase
    config, net, frozen = setup.config, setup.networks["decoder"], state.frozen["decoder"]
    params = state.trainable["decoder"]
    total_weight = jnp.maximum(batch["weights"].astype(layers.accumulation_dtype(config.model.dtype)).sum(), 1.0)
    keys_B = None
    if any(config.model[f"{name}_dropout"] for name in ("token", "residual", "mlp", "attention")):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch["tokens"].shape[0]))

    def part(rows: tuple[dict[str, jax.Array], Any]) -> tuple[Any, train_metrics.Totals, jax.Array]:
        batch, keys_B = rows

        def loss_fn(params: train_state.Params) -> tuple[jax.Array, jax.Array]:
            nll_BL = token_nll(setup, net.module(train_state.join(params, frozen)), batch, keys_B)
            return (nll_BL * batch["weights"]).sum() / total_weight, nll_BL

        (loss, nll_BL), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (loss, grads), {}, nll_BL

    (loss, grads), _, nll_BL = accumulate(part, (batch, keys_B), config.accumulate)
    updates, opt = setup.optimizers["decoder"].update(grads, state.opt["decoder"], params)
    params = optax.apply_updates(params, updates)

    values: train_metrics.Totals = {
        "loss": train_metrics.mean(loss),
        "gradient_norm": train_metrics.mean(optax.global_norm(grads)),
    }
    kinds = {"image": packing.IMAGE} | ({"text": packing.TEXT} if setup.layout.text_length else {})
    for name, kind in kinds.items():
        scored_BL = (batch["kind"] == kind).astype(jnp.float32)
        counts_V = _count(batch["targets"], scored_BL, setup.space.vocab_size)
        values[f"{name}_bits_per_token"] = train_metrics.mean(nll_BL / jnp.log(2.0), scored_BL)
        values[f"unigram_{name}_bits_per_token"] = train_metrics.entropy(counts_V)
    ema = {name: optimizers.update_ema(old, params, config.ema_decay, state.step) for name, old in state.ema.items()}
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        trainable={**state.trainable, "decoder": params},
        opt={**state.opt, "decoder": opt},
        ema=ema,
    )
    return state, values


def _count(ids_BL: jax.Array, weights_BL: jax.Array, size: int) -> jax.Array:
    """Sum of the weights of each id. Each device counts its own rows: a scatter of all rows would gather all ids."""

    def count(ids_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
        return jnp.zeros((1, size), weights_BL.dtype).at[0, ids_BL].add(weights_BL)

    rows = ("batch", None)
    return manual_collectives.map_shards(count, (rows, rows), rows)(ids_BL, weights_BL).sum(axis=0)
