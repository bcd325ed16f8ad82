"""Meshes and layouts, on eight virtual devices in a process of their own where more than one is needed."""

import subprocess
import sys
import textwrap

import jax
import pytest
from jax.sharding import PartitionSpec as P

from imagegpt_jax import sharding
from imagegpt_jax.cli import UserError


def on_eight_devices(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={
            **__import__("os").environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def mesh_of(**sizes):
    """An abstract mesh: enough for layouts, needs no devices."""
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_specs_follow_the_rules_and_leave_what_does_not_divide():
    mesh = mesh_of(data=2, fsdp=4, tensor=2)
    assert sharding.spec_for((8, 16), ("embed", "mlp"), mesh) == P("fsdp", "tensor")
    assert sharding.spec_for((3, 8, 16), ("embed", "mlp"), mesh) == P(None, "fsdp", "tensor")  # stacked layers
    assert sharding.spec_for((6, 16), ("embed", "mlp"), mesh) == P(None, ("tensor", "fsdp"))  # 6 does not divide by 4
    assert sharding.spec_for((6, 6), ("embed", "mlp"), mesh) == P(None, "tensor")
    assert sharding.spec_for((5,), None, mesh) == P(None)
    assert sharding.spec_for((8, 8), ("mlp", "vocab"), mesh) == P("tensor", None)  # one mesh axis is used once


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="does not fit 1 devices"):
        sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1})
    with pytest.raises(UserError, match="one of them may be -1"):
        sharding.make_mesh({"data": -1, "fsdp": -1, "tensor": 1})
    with pytest.raises(UserError, match="use 8 or 16"):
        sharding.check_batch_size(12, mesh_of(data=4, fsdp=2, tensor=1))
    sharding.check_batch_size(16, mesh_of(data=4, fsdp=2, tensor=1))


def test_state_is_born_sharded_and_steps_alike_on_eight_devices(tmp_path):
    """One step of the decoder: same loss on one device and on 2 x 2 x 2, with parameters and moments cut in pieces."""
    out = on_eight_devices("""
        import functools, importlib.util, jax, numpy as np
        from imagegpt_jax import loop, sharding, state
        from imagegpt_jax.config import sibling
        from imagegpt_jax.tasks import decoder

        config = sibling("configs/decoder.py", "decoder.py").get_config("size=test")
        losses = []
        for shape in ({"data": 1, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
            count = np.prod(list(shape.values()))
            mesh = sharding.make_mesh(shape, jax.devices()[:count])
            setup = decoder.setup(config)
            with jax.set_mesh(mesh):
                made, layout = state.init_sharded(
                    functools.partial(decoder.init_state, setup), setup.networks, mesh, 0)
                if count > 1:
                    up = made.trainable["decoder"]["blocks"]["mlp"]["up"]["weight"]
                    assert up.addressable_shards[0].data.size * 4 == up.size, up.sharding
                    moments = [x for x in jax.tree.leaves(made.opt) if x.shape == up.shape]
                    assert moments and all(m.sharding == up.sharding for m in moments)
                stream = decoder.batches(setup, "train", batch_size=8)
                steps = loop.Steps(decoder, setup, mesh, layout)
                for _ in range(2):
                    batch = sharding.put_batch(next(stream), mesh)
                    made, totals = steps("train", made, steps.zeros("train", made, batch), batch)
                    losses.append(float(totals["loss"].compute()))
                stream.close()
        np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-5)
        assert losses[0] != losses[1]
        print("ok")
    """)
    assert "ok" in out
