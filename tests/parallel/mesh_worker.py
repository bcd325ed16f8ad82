"""Trains a task for 20 steps on several meshes, and writes the loss of every step; `test_meshes.py` compares them.

    python tests/parallel/mesh_worker.py OUT.json TASK DEVICES MESH...  [--process=I --processes=N --port=P]

DEVICES is the number of virtual CPU devices of this process; a MESH is data,fsdp,tensor. Everything is run in float32
and in float64.
"""

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import pathlib

STEPS = 20
# The programs run for a moment. Together these make compiling them three times as fast; JAX 0.12 ends at the second.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"


def get_config(task, dtype):
    from imagegpt_jax import config as config_lib

    path = pathlib.Path(__file__).resolve().parents[2] / "configs" / f"{task}.py"
    config = config_lib.sibling(str(path), path.name).get_config("size=test")
    config.data.train = config.data.validation = "emoji:validation,res=16,styles=noto"
    config.steps = STEPS
    config.model.dtype = config.model.param_dtype = dtype
    config.optim.mu_dtype = config.optim.nu_dtype = dtype
    if task == "tokenizer":
        config.discriminator.dtype = config.discriminator.param_dtype = dtype
        config.discriminator_optim.mu_dtype = config.discriminator_optim.nu_dtype = dtype
        config.loss.gan_start = STEPS // 2  # both phases
    else:  # what is dropped is the same wherever it lies
        config.model.update(token_dropout=0.1, residual_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)
    return config


def curve(task, dtype, shape):
    """Scalars of every step on the first devices, and the share of the parameters that the first device holds."""
    import jax
    import numpy as np

    from imagegpt_jax import train_state
    from imagegpt_jax.parallel import sharding
    from imagegpt_jax.tasks import interface

    module = interface.find(task)
    config = get_config(task, dtype)
    setup = module.setup(config)
    mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(list(shape.values()))])
    sharding.check_batch_size(config.batch_size, mesh)
    scalars = []
    with jax.set_mesh(mesh):
        make = functools.partial(module.init_state, setup)
        state, layout = train_state.init_sharded(make, setup.networks, mesh, config.seed)
        state = module.load_frozen(setup, state, layout)
        leaves = jax.tree.leaves(state.trainable)
        held = sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)

        @functools.partial(jax.jit, static_argnums=0, out_shardings=(layout, sharding.replicated(mesh)))
        def step(phase, state, batch):
            batch = module.prepare_batch(setup, state, batch)
            state, values = module.train_step(setup, phase, state, batch)
            return state, {name: metric.compute() for name, metric in values.items()}

        rows = sharding.host_rows(mesh, config.batch_size)
        batches = module.batches(setup, "train", batch_size=config.batch_size, rows=rows)
        for i, batch in zip(range(STEPS), batches, strict=False):
            state, values = step(module.phase(setup, i), state, sharding.put_batch(batch, mesh))
            scalars.append({name: float(value) for name, value in jax.device_get(values).items()})
        batches.close()
    return {"scalars": scalars, "held": held}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("task")
    parser.add_argument("devices", type=int)
    parser.add_argument("meshes", nargs="+")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices} {FAST_COMPILATION}"
    import jax

    if args.processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{args.port}", args.processes, args.process)
    results = {}
    for dtype in ("float32", "float64"):
        results[dtype] = {}
        with jax.enable_x64(dtype == "float64"):
            for mesh in args.meshes:
                shape = dict(zip(("data", "fsdp", "tensor"), map(int, mesh.split(",")), strict=True))
                results[dtype][mesh] = curve(args.task, dtype, shape)
    if args.process == 0:
        args.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
