import gc
import io
import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from imagegpt_jax.data.mixture import Mixture
from imagegpt_jax.data.pipeline import Batches
from imagegpt_jax.errors import UserError

OPS = "decode|random_crop(8)|flip_lr|value_range(-1,1)"


class FakeSource:
    """Records made from their number: small JPEGs with three captions and a label, or codes."""

    label_names = ("a", "b", "c")
    fingerprint = "fake"

    def __init__(self, size, name="fake", kind="image", broken=None):
        self.size, self.name, self.kind, self.broken = size, name, kind, broken

    def __len__(self):
        return self.size

    def __getitems__(self, indices):
        return [self.record(i) for i in indices]

    def record(self, i):
        assert 0 <= i < self.size
        record = {"id": f"{self.name}{i}", "captions": [f"{i}.{j}" for j in range(3)], "label": i % 3}
        if self.kind == "codes":
            return record | {"codes": np.arange(i, i + 4, dtype=np.int32), "grid": (2, 2)}
        image = np.random.default_rng(i).integers(0, 256, (10, 12, 3)).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG", quality=95)
        return record | {"image": b"no image" if i == self.broken else out.getvalue()}


def draw(count, size=7, **options):
    batches = Batches(FakeSource(size), **({"ops": OPS, "batch_size": 4, "seed": 1} | options))
    return list(itertools.islice(batches, count))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_what_a_batch_is():
    (batch,) = draw(1)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((4, 8, 8, 3), "float32"),
        "caption": ((4,), "object"),
        "label": ((4,), "int32"),
        "id": ((4,), "object"),
        "position": ((4,), "int64"),
        "mask": ((4,), "bool"),
    }
    assert all(type(c) is str for c in batch["caption"])
    assert -1 <= batch["image"].min() < -0.5
    assert 0.5 < batch["image"].max() <= 1
    for name, caption, label in zip(batch["id"], batch["caption"], batch["label"], strict=True):
        assert caption.split(".")[0] == name.removeprefix("fake")
        assert label == int(name.removeprefix("fake")) % 3


def test_resuming_at_any_position_gives_the_same_batches():
    whole = draw(6)
    batches = Batches(FakeSource(7), ops=OPS, batch_size=4, seed=1)
    for step in range(4):
        assert batches.position == 4 * step
        assert_same(next(batches), whole[step])
    batches.close()
    for expected, resumed in zip(whole[4:], draw(2, position=batches.position), strict=True):
        assert_same(resumed, expected)
    shifted = draw(1, position=2)[0]  # not a multiple of the batch size: after the batch size was changed
    np.testing.assert_array_equal(shifted["image"], np.concatenate([whole[0]["image"][2:], whole[1]["image"][:2]]))


def test_hosts_together_load_the_global_batch():
    whole = draw(3)
    halves = [draw(3, rows=slice(0, 2)), draw(3, rows=[2, 3])]
    for step in range(3):
        joined = {k: np.concatenate([half[step][k] for half in halves]) for k in whole[step]}
        assert_same(joined, whole[step])


def test_seed_and_epoch_change_order_captions_and_augmentation():
    assert [b["id"].tolist() for b in draw(3)] != [b["id"].tolist() for b in draw(3, seed=2)]
    rows = [
        (name, caption, image.tobytes())
        for batch in draw(7)
        for name, caption, image in zip(batch["id"], batch["caption"], batch["image"], strict=True)
    ]
    epochs = [rows[i : i + 7] for i in range(0, 28, 7)]
    for epoch in epochs:
        assert sorted(name for name, _, _ in epoch) == [f"fake{i}" for i in range(7)]
    assert len({tuple(name for name, _, _ in epoch) for epoch in epochs}) == 4
    of_one = [row for row in rows if row[0] == "fake3"]
    assert len({caption for _, caption, _ in of_one}) > 1
    assert len({image for _, _, image in of_one}) == 4


def test_evaluation_sees_every_example_once_and_masks_the_rest():
    batches = Batches(FakeSource(7), ops="decode|central_crop(8)", batch_size=4, shuffle=False, epochs=1)
    got = list(batches)
    assert [b["mask"].tolist() for b in got] == [[True] * 4, [True] * 3 + [False]]
    assert np.concatenate([b["id"] for b in got]).tolist() == [f"fake{i}" for i in [0, 1, 2, 3, 4, 5, 6, 6]]
    assert got[0]["image"].dtype == np.uint8
    assert batches.position == 7
    with pytest.raises(StopIteration):
        next(batches)
    last_host = draw(9, shuffle=False, epochs=1, rows=slice(3, 4))
    assert [b["mask"].tolist() for b in last_host] == [[True], [False]]
    assert draw(9, epochs=1, position=7) == []


def test_mixture_weights_and_labels():
    mixture = Mixture([FakeSource(5, "x"), FakeSource(50, "y", kind="codes")], [0.75, 0.25])
    batches = list(itertools.islice(Batches(mixture, batch_size=20, columns=["caption", "label"]), 3))
    for batch in batches:
        assert sum(name.startswith("x") for name in batch["id"]) == 15
        assert "image" not in batch
    in_order = list(Batches(mixture, batch_size=55, shuffle=False, epochs=1, columns=["caption"]))
    assert in_order[0]["id"][[0, 4, 5, 54]].tolist() == ["x0", "x4", "y0", "y49"]


def test_columns():
    assert set(draw(1, columns=["label"])[0]) == {"label", "id", "position", "mask"}
    with pytest.raises(UserError, match="fake has no codes, only image, caption, label"):
        Batches(FakeSource(3), batch_size=2, columns=["codes"])
    with pytest.raises(UserError, match="batch_size=0"):
        Batches(FakeSource(3), batch_size=0)
    with pytest.raises(UserError, match="Did you mean 'flip_lr'"):
        Batches(FakeSource(3), ops="decode|flip_rl", batch_size=2)


def test_token_shards_load_no_tensorflow():
    batch = next(Batches(FakeSource(9, kind="codes"), batch_size=4))
    assert batch["codes"].shape == (4, 4)
    assert batch["codes"].dtype == np.int32
    assert (batch["codes"][:, 0] == [int(name.removeprefix("fake")) for name in batch["id"]]).all()
    program = (
        "import sys, numpy as np; from imagegpt_jax.data.pipeline import Batches\n"
        "class S:\n"
        "  name = fingerprint = 's'; label_names = ()\n"
        "  def __len__(self): return 3\n"
        "  def __getitems__(self, ii): return [{'id': str(i), 'codes': np.arange(4), 'grid': (2, 2)} for i in ii]\n"
        "batch = next(Batches(S(), batch_size=2)); print([m for m in ('tensorflow', 'jax') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_host_fn_runs_ahead_in_another_thread():
    threads = []

    def host_fn(batch):
        threads.append(threading.current_thread())
        return {"twice": batch["label"] * 2, "label": batch["label"]}

    batches = Batches(FakeSource(9, kind="codes"), batch_size=4, host_fn=host_fn)
    first = next(batches)
    np.testing.assert_array_equal(first["twice"], first["label"] * 2)
    deadline = time.monotonic() + 5
    while len(threads) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(threads) >= 3
    assert threading.current_thread() not in threads
    assert batches.position == 4  # what was prepared does not count
    failing = Batches(FakeSource(9, kind="codes"), batch_size=4, host_fn=lambda batch: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            next(failing)


@pytest.mark.parametrize("kind", ["codes", "image"])
def test_reading_ahead_stops(kind):
    def reading():
        return [t for t in threading.enumerate() if t.name == "batches"]

    gc.collect()
    before = len(reading())
    batches = Batches(FakeSource(9, kind=kind), batch_size=4)
    next(batches)
    assert len(reading()) == before + 1
    batches.close()
    assert len(reading()) == before
    with pytest.raises(StopIteration):
        next(batches)
    batches = Batches(FakeSource(9, kind=kind), batch_size=4)
    next(batches)
    del batches
    gc.collect()
    assert len(reading()) == before


def test_an_image_that_is_none_is_named_when_its_turn_comes():
    options = {"ops": OPS, "batch_size": 2, "shuffle": False}
    batches = Batches(FakeSource(9, broken=5), **options)
    assert [next(batches)["id"][0] for _ in range(2)] == ["fake0", "fake2"]
    for _ in range(2):
        with pytest.raises(
            UserError, match="image 'fake5' of fake is not an image of a known format: replace or remove"
        ):
            next(batches)
    assert batches.position == 4


def test_sizes_that_do_not_fit_are_explained():
    with pytest.raises(UserError, match=r"image 'fake0' of fake cannot be processed.*smaller than the crop of 20 x 20"):
        draw(1, ops="decode|random_crop(20)", shuffle=False)

    class Sizes(FakeSource):
        def record(self, i):
            out = io.BytesIO()
            Image.new("RGB", (10 + i, 10)).save(out, "PNG")
            return {"id": str(i), "image": out.getvalue()}

    with pytest.raises(UserError, match=r"different sizes \(image '0' of fake: 10 x 10, image '1' of fake: 10 x 11\)"):
        next(Batches(Sizes(4), ops="decode", batch_size=2, shuffle=False))


def test_an_error_of_the_source_arrives_whole():
    class Gone(FakeSource):
        def record(self, i):
            if i == 3:
                raise UserError("the disk is gone: mount it.")
            return super().record(i)

    batches = Batches(Gone(9), ops=OPS, batch_size=2, shuffle=False)
    next(batches)
    with pytest.raises(UserError, match="the disk is gone"):
        next(batches)
