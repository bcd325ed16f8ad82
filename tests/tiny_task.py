"""A task as small as one can be, a line through points, with which the loop is tested in seconds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from imagegpt_jax import train_state
from imagegpt_jax.data.pipeline import position_after
from imagegpt_jax.metrics.evaluator import Evaluation
from imagegpt_jax.runtime import preemption
from imagegpt_jax.tasks import interface
from imagegpt_jax.training import train_metrics


class Line(nnx.Module):
    def __init__(self, *, key):
        self.slope = nnx.Param(jax.random.normal(key, (3,)), axes=(None,))


NETWORK = train_state.network(lambda key: Line(key=key))


def make_config(**changes):
    config = ConfigDict(
        {
            "task": "line",
            "seed": 0,
            "steps": 12,
            "batch_size": 4,
            "eval_batch_size": 4,
            "accumulate": 1,
            "compiler_options": "",
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "data": {"quarantine": {"max_share": 0.1, "accept": ()}},
            "log_every": 1,
            "eval_every": 4,
            "checkpoint": {"every": 2, "keep": 0, "keep_every_hours": 0.0, "keep_best": ""},
            "guard": {"spike": 0.0, "window": 100, "patience": 3, "max_rollbacks": 2},
            "frozen": (),
            "init_from": "",
            "init_partial": False,
        }
    )
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    config: object
    networks: dict
    optimizers: dict
    sources: dict


class Task(interface.Task):
    """What the loop is to know; `bad` are the positions whose examples are NaN."""

    def __init__(self, bad=(), hook=None, **fields):
        methods = ("setup", "init_state", "train_step", "batches", "evaluators")
        super().__init__(**{name: getattr(self, name) for name in methods}, **fields)
        self.bad, self.drawn, self.evaluations = frozenset(bad), [], []
        self.hook = hook or (lambda step: None)

    def setup(self, config):
        return Setup(config, {"line": NETWORK}, {"line": optax.adam(0.1)}, {})

    def init_state(self, setup, key):
        return train_state.init(setup.networks, setup.optimizers, {}, key, phases=("train",), ema=("line",))

    def train_step(self, setup, phase, old, batch):
        def loss_fn(params):
            return jnp.square(batch["x"] @ params["slope"] - batch["y"]).mean()

        params = old.trainable["line"]
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, opt = setup.optimizers["line"].update(gradient, old.opt["line"], params)
        params = optax.apply_updates(params, updates)
        values = {"loss": train_metrics.mean(loss), "gradient_norm": train_metrics.mean(optax.global_norm(gradient))}
        ema = {"line": jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, old.ema["line"], params)}
        new = dataclasses.replace(old, step=old.step + 1, trainable={"line": params}, opt={"line": opt}, ema=ema)
        return new, values

    def batches(self, setup, split, *, batch_size, position=0, rows=None, skipped=()):
        return Batches(self, batch_size, position, skipped)

    def evaluators(self, setup, mesh):
        return (self,)

    def evaluate(self, params, step):
        self.hook(-step)
        preemption.current.check()
        self.evaluations.append(step)
        return Evaluation({"validation/loss": float(jnp.abs(params["line"]["slope"]).sum())})


class Batches:
    def __init__(self, task, batch_size, position, skipped):
        self.task, self.size, self.start, self.skipped, self.given = task, batch_size, position, skipped, 0
        self.position = position

    def __iter__(self):
        return self

    def __next__(self):
        begin = position_after(self.start, self.given, self.size, self.skipped)
        self.given += 1
        self.position = begin + self.size
        self.task.drawn.append(begin)
        self.task.hook(len(self.task.drawn))
        position = np.arange(begin, begin + self.size)
        x = np.stack([np.random.default_rng(p).normal(size=3) for p in position]).astype(np.float32)
        y = x.sum(1)
        y[[p in self.task.bad for p in position]] = np.nan
        return {"x": x, "y": y, "position": position}

    def close(self):
        pass
