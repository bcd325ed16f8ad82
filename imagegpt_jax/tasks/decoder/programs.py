"""What can be compiled ahead of a decoder: its training step on images or tokens, and the two programs of sampling.

Shapes: R rows, D width, V ids that may be drawn.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from imagegpt_jax import train_state
from imagegpt_jax.config import Config
from imagegpt_jax.errors import UserError
from imagegpt_jax.models import gpt
from imagegpt_jax.parallel import manual_collectives, sharding
from imagegpt_jax.sampling.decode_weights import prepare, score
from imagegpt_jax.sampling.engine import prefill, step
from imagegpt_jax.tasks.decoder import from_data
from imagegpt_jax.tasks.decoder.batches import abstract_batch
from imagegpt_jax.tasks.decoder.setup import Setup, setup_abstract
from imagegpt_jax.tasks.decoder.train_step import forward_flops
from imagegpt_jax.tasks.interface import Perf, Program
from imagegpt_jax.train_state import TrainState


class Sampling:
    """Prefill with its first scores, and one guided step, of as many pictures as a training batch has.

    Rows are twice the pictures, and each device has its own.

    Weights are laid out as `sampling.batching.place` does: sharded over `tensor` alone, in the compute dtype. They are
    traced, from abstract parameters as trained, where they are first asked for.
    """

    def __init__(self, setup: Setup, mesh: Mesh, state: TrainState):
        self.setup, self.mesh, self.params = setup, mesh, state.params("decoder")
        self.rows = 2 * setup.config.batch_size
        self.cut = sharding.batch_sharding(self.mesh)
        layout, model = self.setup.layout, self.setup.model
        slots = layout.prompt_length + (model.feature_length if model.conditioning == "prefix" else 0)
        self.capacity = slots + layout.num_codes - 1
        self.start_rows = jax.jit(lambda *args: manual_collectives.map_rows(self._begin, (False, True))(*args))

    def programs(self) -> Iterator[Program]:
        """ "prefill" and "decode"."""
        count = functools.partial(forward_flops, self.setup, self.rows)
        flops = count(self.setup.layout.prompt_length, 1)
        yield Program("prefill", self._lower_prefill, flops, lambda: self.weights, trains=False)
        flops = count(1, 1, self.capacity)
        yield Program("decode", self._lower_step, flops, lambda: self.weights, self._reads, trains=False)

    def _reads(self) -> dict[str, int]:
        parts = {"weights": self.weights, "cache": (self.cache.keys, self.cache.values)}
        return {name: train_state.held_bytes(part) for name, part in parts.items()}

    def _array(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((self.rows, *shape), dtype, sharding=self.cut)

    @functools.cached_property
    def weights(self) -> Any:
        """The decoder's parameters."""

        def make(params: Any) -> Any:
            return prepare(self.setup.networks["decoder"].module(params))

        with jax.set_mesh(self.mesh):
            abstract = jax.eval_shape(make, self.params)
            return train_state.with_shardings(abstract, sharding.tensor_shardings(abstract, self.mesh))

    @property
    def prompt(self) -> gpt.Sequence:
        """The rows' prompts, as `Layout.prompt` packs them, with features where a text encoder reads the words."""
        model = self.setup.model
        packed = self.setup.layout.prompt([[]])
        if model.feature_width:
            packed["features"] = np.zeros((1, model.feature_length, model.feature_width), np.float32)
            packed["feature_mask"] = np.zeros((1, model.feature_length), bool)
        return gpt.Sequence.from_batch({name: self._array(x.shape[1:], x.dtype) for name, x in packed.items()})

    @functools.cached_property
    def cache(self) -> Any:
        """What prefill leaves."""
        with jax.set_mesh(self.mesh):
            cache = jax.eval_shape(self.start_rows, self.weights, self.prompt)[1]
        heads = NamedSharding(self.mesh, sharding.activation_spec(("batch", "kv_heads", None, None), self.mesh))
        where = {4: heads, 2: self.cut}
        layout = jax.tree.map(lambda x: where.get(x.ndim, sharding.replicated(self.mesh)), cache)
        return train_state.with_shardings(cache, layout)

    def _begin(self, weights: Any, prompt: gpt.Sequence) -> Any:
        hidden_RD, cache = prefill(weights, prompt, self.capacity)
        return score(hidden_RD, weights.output_table(*self.setup.layout.image_ids)), cache

    def _lower_prefill(self) -> Any:
        return self.start_rows.lower(self.weights, self.prompt)

    def _lower_step(self) -> Any:
        model, ids = self.setup.model, self.setup.layout.image_ids
        table_VD = jax.eval_shape(lambda weights: weights.output_table(*ids), self.weights)
        cut_V = NamedSharding(self.mesh, sharding.activation_spec(("vocab", None), self.mesh))
        table_VD = jax.ShapeDtypeStruct(table_VD.shape, table_VD.dtype, sharding=cut_V)
        targets_R3 = self._array((3,)) if model.target_positions else None
        prompt = self.prompt if model.conditioning == "adaptive_norm" else None

        def add(weights: Any, table_VD: Any, state: Any, prompt: Any) -> Any:  # the table is cut before the loop
            cache, tokens_R, positions_R3, targets_R3 = state
            hidden_RD, cache = step(
                weights, cache, tokens_R, positions_R3, target_positions_R3=targets_R3, prompt=prompt
            )
            return score(hidden_RD, table_VD), cache

        add_token = jax.jit(
            lambda *args: manual_collectives.map_rows(add, (False, False, True, True))(*args), donate_argnums=2
        )
        state = self.cache, self._array(()), self._array((3,)), targets_R3
        return add_token.lower(self.weights, table_VD, state, prompt)


def inputs_of(config: Config) -> str:
    """What a config's `data.train` names: "images", or "tokens" that were made of them; of a mixture the first part."""
    return "tokens" if re.match(r"\s*([\d.]+\s*\*\s*)?tokens:", config.data.train) else "images"


def with_inputs(config: Config, inputs: str) -> Config:
    """A copy of a config whose step is given "images" or "tokens"; token shards need not be there.

    Raises UserError for images, if `data.train` names token shards.
    """
    config = ConfigDict(config.to_dict())
    if inputs_of(config) != inputs:
        if inputs == "images":
            raise UserError(f"data.train={config.data.train} are token shards: leave out --inputs=images.")
        config.data.train = "tokens:shards"
    return config


def setup_to_compile(config: Config) -> Setup:
    """An abstract setup; of images, with the tokenizer that encodes them within the step."""
    setup = setup_abstract(config)
    if inputs_of(config) == "tokens":
        return setup
    return dataclasses.replace(setup, networks={**setup.networks, "tokenizer": setup.tokenizer.networks["generator"]})


def encoding_reads(setup: Setup) -> dict[str, list[bool]]:
    """For each of the image tokenizer's parameters, in the order of their leaves, whether the step reads it."""
    if "tokenizer" not in setup.networks:
        return {}
    network = setup.networks["tokenizer"]
    params = train_state.split(network.abstract)[1]

    def encode(params: Any, image: jax.Array) -> jax.Array:
        return network.module(params).encode_codes(image)  # pyright: ignore[reportAttributeAccessIssue]

    jaxpr = jax.make_jaxpr(encode)(params, abstract_batch(setup, 1)["image"]).jaxpr
    read = {x for equation in jaxpr.eqns for x in equation.invars if isinstance(x, core.Var)}
    return {"tokenizer": [x in read for x in jaxpr.invars[: len(jax.tree.leaves(params))]]}


def kept_activations(config: Config) -> int:
    """Numbers that the inputs of all blocks are for one example."""
    data, model = from_data.assumed(config).data, config.model
    return (math.prod(data.grid) + data.text_length) * model.width * model.depth


def summed_activations(setup: Setup, rows: int) -> int:
    """Numbers that `tensor` sums in a step of so many rows: twice in a block forward, twice backward, and once more
    where the block is recomputed.
    """
    model, layout = setup.model, setup.layout
    stream = rows * (layout.text_length + layout.num_codes) * model.width
    return (4 + (model.remat != "none")) * model.depth * stream


PERF = Perf(
    inputs=inputs_of,
    with_inputs=with_inputs,
    setup=setup_to_compile,
    programs=lambda setup, mesh, state: Sampling(setup, mesh, state).programs(),
    remats=("none", "dots", "attention", "full"),
    frozen_reads=encoding_reads,
    kept_activations=kept_activations,
    summed_activations=summed_activations,
    sequence=lambda setup: (setup.layout.length, setup.space.num_codes),
)
