"""Meshes and layouts, on eight virtual devices in a process of their own where more than one is needed."""

import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from imagegpt_jax import train_state
from imagegpt_jax.config import sibling
from imagegpt_jax.errors import UserError
from imagegpt_jax.parallel import sharding
from imagegpt_jax.tasks import decoder


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
    assert sharding.spec_for((8, 8), ("mlp", "embed"), mesh) == P("tensor", "fsdp")  # each a dimension of its own
    assert sharding.spec_for((8, 6), ("mlp", "embed"), mesh) == P(("tensor", "fsdp"), None)  # 6 does not divide by 4
    assert sharding.spec_for((4, 8), ("vocab", "embed"), mesh) == P("tensor", "fsdp")  # 4 / 2 does not divide by 4


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="does not fit 1 devices"):
        sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1})
    with pytest.raises(UserError, match="one of them may be -1"):
        sharding.make_mesh({"data": -1, "fsdp": -1, "tensor": 1})
    with pytest.raises(UserError, match="use 8 or 16"):
        sharding.check_batch_size(12, mesh_of(data=4, fsdp=2, tensor=1))
    sharding.check_batch_size(16, mesh_of(data=4, fsdp=2, tensor=1))


@pytest.mark.parametrize(
    ("count", "sizes", "use"),
    [
        (8, (-1, 3, 1), "mesh.fsdp=4 or mesh.fsdp=2"),
        (8, (2, 2, 1), "mesh.data=4 or mesh.fsdp=4"),
        (8, (-1, 3, 3), "mesh.fsdp=4 mesh.tensor=2 or mesh.fsdp=2 mesh.tensor=4"),
        (12, (2, -1, 5), "mesh.tensor=6 or mesh.tensor=3"),
        (1, (1, 3, 1), "mesh.fsdp=1"),
    ],
)
def test_meshes_that_do_not_fit_are_told_with_the_nearest_that_do(count, sizes, use):
    mesh = dict(zip(sharding.CONFIG_AXES, sizes, strict=True))
    with pytest.raises(UserError, match=rf"does not fit {count} devices: .*: use {use}\.$"):
        sharding.mesh_shape(mesh, count)
    for choice in use.split(" or "):
        changes = dict(item.removeprefix("mesh.").split("=") for item in choice.split())
        assert np.prod(list(sharding.mesh_shape(mesh | changes, count).values())) == count


def test_state_is_born_sharded_and_steps_alike_on_eight_devices(tmp_path):
    """One step of the decoder: same loss on one device and on 2 x 2 x 2, with parameters and moments cut in pieces."""
    out = on_eight_devices("""
        import functools, importlib.util, jax, numpy as np
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax import train_state
        from imagegpt_jax.config import sibling
        from imagegpt_jax.training.steps import Steps
        from imagegpt_jax.tasks import decoder

        config = sibling("configs/decoder.py", "decoder.py").get_config("size=test")
        losses = []
        for shape in ({"data": 1, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
            count = np.prod(list(shape.values()))
            mesh = sharding.make_mesh(shape, jax.devices()[:count])
            setup = decoder.setup(config)
            with jax.set_mesh(mesh):
                made, layout = train_state.init_sharded(
                    functools.partial(decoder.init_state, setup), setup.networks, mesh, 0)
                if count > 1:
                    up = made.trainable["decoder"]["blocks"]["mlp"]["up"]["weight"]
                    assert up.addressable_shards[0].data.size * 4 == up.size, up.sharding
                    moments = [x for x in jax.tree.leaves(made.opt) if x.shape == up.shape]
                    assert moments and all(m.sharding == up.sharding for m in moments)
                stream = decoder.batches(setup, "train", batch_size=8)
                steps = Steps(decoder.TASK, setup, mesh, layout)
                for _ in range(2):
                    batch = sharding.put_batch(next(stream), mesh)
                    made, totals = steps("train", made, steps.zeros("train", made, batch), batch)
                    losses.append(float(totals["metrics"]["loss"].compute()))
                stream.close()
        np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-5)
        assert losses[0] != losses[1]
        print("ok")
    """)
    assert "ok" in out


def test_rows_of_a_table_are_the_same_however_tensor_and_fsdp_cut_it():
    """Each along a dimension of its own, where `tensor` keeps its cut while `fsdp` is gathered; or both along ids."""
    on_eight_devices(
        """
        import jax, numpy as np
        from flax import nnx
        from imagegpt_jax.parallel import fsdp
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax.models import layers

        mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
        ids_BL = jax.random.randint(jax.random.key(1), (8, 5), -4, 68)  # some are clamped
        both = ("fsdp", "fsdp_minor")
        for width, spec in ((64, jax.P("tensor", both)), (6, jax.P(("tensor", *both), None))):
            table = layers.Embedding(64, width, key=jax.random.key(0))
            assert sharding.spec_for((64, width), ("vocab", "embed"), mesh) == spec
            cut = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec)), table)
            for read in (layers.Embedding.__call__, layers.Embedding.stream):

                def loss(table, ids_BL):
                    rows = lambda ids_BL, table, _, gather: read(gather(table), ids_BL)
                    x_BLD = fsdp.run(rows, ids_BL, table, None, np.float32)
                    return (x_BLD ** 2).sum(), x_BLD

                with jax.set_mesh(mesh):
                    gradient, x_BLD = jax.jit(jax.grad(loss, has_aux=True))(cut, ids_BL)
                expected, whole_BLD = jax.grad(loss, has_aux=True)(table, ids_BL)
                np.testing.assert_array_equal(x_BLD, whole_BLD)
                np.testing.assert_allclose(gradient.weight[...], expected.weight[...], rtol=1e-6)
        """
    )


def test_looked_up_tokens_are_sent_as_columns():
    """The same rows for half the bytes of their sum, on a mesh that cuts the vocabulary."""
    out = on_eight_devices(
        """
        import jax, jax.numpy as jnp, numpy as np
        from imagegpt_jax.perf import hlo
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax.models import layers

        mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 4})
        ids_BL = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
        table = layers.Embedding(64, 32, key=jax.random.key(0), dtype="bfloat16")
        cut = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("tensor", None))), table)
        rows = jax.device_put(ids_BL, sharding.batch_sharding(mesh))
        expected, counts = np.float32(table(ids_BL)), []
        with jax.set_mesh(mesh):
            for read in (layers.Embedding.__call__, layers.Embedding.stream):
                compiled = jax.jit(read).lower(cut, rows).compile()
                np.testing.assert_array_equal(np.float32(compiled(cut, rows)), expected)
                counts.append(hlo.count(compiled.as_text()))
        whole, columns = ({kind: total.bytes for kind, total in moved.items()} for moved in counts)
        assert whole == {"all-reduce": 2 * columns["all-to-all"]} and len(columns) == 1, (whole, columns)
        print("ok")
        """
    )
    assert "ok" in out


def test_heads_that_do_not_divide_are_told_with_what_would():
    mesh = mesh_of(data=1, fsdp=1, tensor=8)
    sharding.check_divides({"model.heads": 16}, "tensor", mesh)
    with pytest.raises(
        UserError, match="model.heads=12 does not divide over mesh.tensor=8: use mesh.tensor=2 or 4, or a model.heads"
    ):
        sharding.check_divides({"model.kv_heads": 8, "model.heads": 12}, "tensor", mesh)


@pytest.mark.parametrize(
    ("sizes", "mesh", "use"),
    [
        ({"mlp_width": 65}, (4, 1, 2), "1"),  # 5 and 13 divide it, and not 8 devices
        ({"num_codes": 60}, (1, 1, 8), "2 or 4"),
        ({"heads": 12, "kv_heads": 2}, (1, 1, 8), "1 or 2"),  # 4 divides the heads alone
        ({"heads": 12}, (2, 3, 8), "2 or 4"),  # with 3 as `fsdp`, 6 and 12 do not divide 48 devices
        ({"heads": 12}, (3, 1, 8), "4 or 6 or 12"),
    ],
)
def test_sizes_of_an_axis_that_are_named_divide_everything(sizes, mesh, use):
    with pytest.raises(UserError, match=f": use mesh.tensor={use}, or a"):
        sharding.check_divides(sizes, "tensor", mesh_of(**dict(zip(sharding.CONFIG_AXES, mesh, strict=True))))


@pytest.mark.parametrize(("vocab_multiple", "tensor", "use"), [(1, 3, 3), (128, 3, 384), (128, 12, 384)])
def test_a_vocabulary_is_filled_up_to_a_multiple_of_tensor(vocab_multiple, tensor, use):
    config = sibling("configs/x.py", "decoder.py").get_config("size=test")
    config.model.update(width=48, heads=12, kv_heads=12, mlp_width=96)
    config.data.update(text_vocab_size=500, vocab_multiple=vocab_multiple)  # 568 ids, or 640
    mesh = jax.sharding.AbstractMesh((1, 1, 1, tensor), sharding.MESH_AXES)
    with pytest.raises(UserError, match=rf"set --config.data.vocab_multiple={use}, which fills it up"):
        decoder.check_mesh(decoder.setup_abstract(config), mesh)
    config.data.vocab_multiple = use
    decoder.check_mesh(decoder.setup_abstract(config), mesh)


def test_more_devices_than_batch_is_told_with_what_would():
    with pytest.raises(UserError, match="batch_size=8 .* 16 devices: use 16, or data x fsdp = 8 devices"):
        sharding.check_batch_size(8, mesh_of(data=4, fsdp=4, tensor=1))
    with pytest.raises(UserError, match="batch_size=6 .* 8 devices: use 8, or data x fsdp = 2 devices"):
        sharding.check_batch_size(6, mesh_of(data=8, fsdp=1, tensor=1))  # 6 and 3 do not divide 8 devices
    with pytest.raises(UserError, match="batch_size=6 .* accumulate=4: use 32\\.$"):
        sharding.check_batch_size(6, mesh_of(data=8, fsdp=1, tensor=1), accumulate=4)
    with pytest.raises(UserError, match="batch_size=24 .* 8 devices x accumulate=2: use 16 or 32"):
        sharding.check_batch_size(24, mesh_of(data=8, fsdp=1, tensor=1), accumulate=2)
    with pytest.raises(UserError, match="accumulate=0"):
        sharding.check_batch_size(24, mesh_of(data=1, fsdp=1, tensor=1), accumulate=0)


def test_fsdp_takes_whole_axes_of_the_torus_where_it_can():
    assert sharding.minor_sizes(256)[0] == 16
    assert sharding.minor_sizes(128) == [8, 4, 2, 1]
    assert sharding.minor_sizes(7) == [1]


def test_what_is_left_of_fsdp_goes_to_another_dimension():
    mesh = jax.sharding.AbstractMesh((1, 16, 16, 1), sharding.MESH_AXES)
    assert sharding.spec_for((24, 3072, 8704), ("embed", "mlp"), mesh) == P(None, ("fsdp", "fsdp_minor"), None)
    assert sharding.spec_for((24, 3200, 8720), ("embed", "mlp"), mesh) == P(None, "fsdp", "fsdp_minor")  # 3200 / 256


def test_fsdp_cuts_the_dimension_whose_parts_are_whole_tiles():
    mesh = jax.sharding.AbstractMesh((1, 32, 8, 1), sharding.MESH_AXES)
    both = ("fsdp", "fsdp_minor")
    assert sharding.spec_for((24, 1280, 3584), ("embed", "mlp"), mesh) == P(None, None, both)  # 40 rows, 112 columns
    assert sharding.spec_for((24, 3584, 1280), ("mlp", "embed"), mesh) == P(None, both, None)
    assert sharding.spec_for((24, 5120, 13824), ("embed", "mlp"), mesh) == P(None, both, None)  # 160, 432: the first
    mesh = jax.sharding.AbstractMesh((1, 8, 8, 4), sharding.MESH_AXES)
    down = sharding.spec_for((24, 13824, 5120), ("mlp", "embed"), mesh)
    assert down == P(None, "tensor", both)  # 13824 / 4 / 8 / 8 = 54, 5120 / 8 / 8 = 80


def test_factored_moments_are_cut_along_the_dimensions_that_they_have():
    params = {"w": jax.ShapeDtypeStruct((4, 8, 16), "float32")}
    specs = {"w": P(None, "fsdp", "tensor")}

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, "float32")

    tree = {"row": {"w": array(4, 8)}, "column": {"w": array(4, 16)}, "none": {"w": array(1)}, "count": array()}
    tree["roots"] = {"w": {"rows": array(4, 1, 1, 512, 512), "few": array(8, 8)}}
    mesh = jax.sharding.AbstractMesh((1, 4, 2, 1), sharding.MESH_AXES)
    results = sharding.tree_specs(tree, params, specs, mesh)
    assert results["roots"]["w"] == {"rows": P(None, None, None, None, ("fsdp", "fsdp_minor")), "few": P()}
    assert results["row"]["w"] == P(None, "fsdp")
    assert results["column"]["w"] == P(None, "tensor")
    assert results["none"]["w"] == results["count"] == P()


@pytest.mark.parametrize("tensor", [1, 4])
def test_no_large_array_of_the_largest_preset_s_optimizer_is_on_every_device(tensor):
    config = sibling("configs/x.py", "decoder.py").get_config("size=20B")
    setup = decoder.setup_abstract(config)
    made = jax.eval_shape(lambda: decoder.init_state(setup, jax.random.key(0)))
    mesh = jax.sharding.AbstractMesh((1, 16, 16 // tensor, tensor), sharding.MESH_AXES)
    layout = train_state.shardings(made, setup.networks, mesh)
    pairs = list(zip(jax.tree.leaves(made.opt), jax.tree.leaves(layout.opt), strict=True))
    large = [(x.shape, where) for x, where in pairs if x.size * x.dtype.itemsize > train_state.MIB]
    assert (64, 13824) in [shape for shape, _ in large]  # the columns' of an mlp, which `fsdp` cuts along its rows
    parts = {shape: 256 * np.prod(where.shard_shape(shape)) / np.prod(shape) for shape, where in large}
    assert {shape: part for shape, part in parts.items() if part > tensor} == {}


def test_slices_are_joined_by_data_and_rows_of_a_host_need_not_be_neighbours():
    """Eight devices in an order as a torus gives, of two processes and two slices."""
    out = on_eight_devices("""
        import jax, numpy as np
        from jax.sharding import Mesh
        from imagegpt_jax.parallel import sharding
        from imagegpt_jax.errors import UserError

        class Sliced:
            def __init__(self, device, index): self.device, self.slice_index = device, index
            def __getattr__(self, name): return getattr(self.device, name)

        devices = [Sliced(d, i // 4) for i, d in enumerate(jax.devices())]
        try:
            sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1}, devices)
        except UserError as e:
            print(e)
        order = [0, 4, 1, 5, 2, 6, 3, 7]
        mesh = Mesh(np.array(jax.devices())[order].reshape(2, 2, 2, 1), sharding.MESH_AXES)
        whole = np.arange(16 * 3).reshape(16, 3)
        original = sharding.host_rows
        mine = np.array([0, 1, 4, 5, 8, 9, 12, 13])  # of the devices 0, 1, 2, 3

        class Local:
            def addressable_devices_indices_map(self, shape):
                index = real.devices_indices_map(shape)
                return {d: i for d, i in index.items() if d.id < 4}
        real = sharding.batch_sharding(mesh)
        keep = sharding.batch_sharding
        sharding.batch_sharding = lambda mesh: Local()
        np.testing.assert_array_equal(sharding.host_rows(mesh, 16), mine)
        sharding.batch_sharding = keep
        batch = sharding.put_batch({"x": whole, "text": np.array(["a"] * 16)}, mesh)
        assert set(batch) == {"x"}
        np.testing.assert_array_equal(batch["x"], whole)
        for shard in batch["x"].addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    """)
    assert "mesh.data=1 does not divide over 2 slices" in out
