import jax
import numpy as np
import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import common
from imagegpt_jax.parallel import sharding


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def test_mean_is_weighted_and_ignores_what_weighs_nothing():
    mean = common.Mean()
    mean.add({"a": np.array([1.0, 2.0, np.nan])}, np.array([1.0, 3.0, 0.0]))
    mean.add({"a": np.array([10.0])}, np.array([4.0]))
    assert mean.result()["a"] == pytest.approx((1 + 6 + 40) / 8)


def test_mean_sums_in_float64():
    mean = common.Mean()
    mean.add({"a": np.array([1e8], np.float32)}, np.array([1.0]))
    for _ in range(1000):
        mean.add({"a": np.array([1.0], np.float32)}, np.array([1.0]))
    assert mean.result()["a"] == (1e8 + 1000) / 1001


def test_mean_of_nothing_is_an_error():
    with pytest.raises(UserError, match="empty"):
        common.Mean().result()
    mean = common.Mean()
    mean.add({"a": np.zeros(2)}, np.zeros(2))
    with pytest.raises(UserError, match="empty"):
        mean.result()


@pytest.mark.parametrize(
    ("counts", "bits"), [([1, 1, 1, 1], 2.0), ([7, 0, 0], 0.0), ([], 0.0), ([1, 1, 2, 0], 1.5), ([0, 0], 0.0)]
)
def test_entropy_bits(counts, bits):
    assert common.entropy_bits(np.array(counts)) == pytest.approx(bits)


def test_outputs_come_in_order_with_a_mask_and_nothing_lost(mesh):
    batches = [{"x": np.full((2, 3), i, np.float32), "text": np.array(["a", "b"], object)} for i in range(3)]
    fn = jax.jit(lambda params, batch: {"y": batch["x"] * params, "mask": batch["mask"]})
    out = list(common.outputs(fn, 2.0, batches, ("x", "mask"), mesh))
    assert [o["y"][0, 0] for o in out] == [0.0, 2.0, 4.0]
    assert all(isinstance(o["y"], np.ndarray) and o["mask"].all() for o in out)


def test_outputs_name_a_missing_column(mesh):
    with pytest.raises(UserError, match=r"no 'image'.*label"):
        list(common.outputs(jax.jit(lambda p, b: b), 0.0, [{"label": np.zeros(2)}], ("image",), mesh))
