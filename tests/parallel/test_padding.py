import jax.numpy as jnp
import numpy as np

from imagegpt_jax.parallel import padding


def test_the_last_batch_is_filled_up_and_its_copies_are_dropped():
    rows = np.arange(14, dtype=np.float32).reshape(7, 2)
    seen = []

    def double(x_BX, y_BX):
        seen.append(np.asarray(x_BX))
        return jnp.asarray(x_BX + y_BX)

    np.testing.assert_array_equal(padding.map_batches(double, 3, rows, rows), 2 * rows)
    assert [x.shape for x in seen] == [(3, 2)] * 3
    np.testing.assert_array_equal(seen[-1], rows[[6, 6, 6]])
    np.testing.assert_array_equal(padding.pad(rows[:2], 4), rows[[0, 1, 1, 1]])
    parts = list(padding.padded_batches(7, 4))
    assert [part for part, _ in parts] == [slice(0, 4), slice(4, 7)]
    assert [index.tolist() for _, index in parts] == [[0, 1, 2, 3], [4, 5, 6, 6]]


def test_outputs_are_fetched_one_batch_behind():
    order = []

    def run(x_B):
        order.append(f"run {x_B[0]}")
        return x_B

    def fetch(x_B):
        order.append(f"fetch {x_B[0]}")
        return x_B

    padding.map_batches(run, 2, np.arange(5), fetch=fetch)
    assert order == ["run 0", "run 2", "fetch 0", "run 4", "fetch 2", "fetch 4"]
