import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.training import train_metrics


def test_means_merge_by_weight():
    a = train_metrics.mean(jnp.asarray([1.0, 2.0]))
    b = train_metrics.mean(jnp.asarray([10.0, 99.0]), jnp.asarray([1.0, 0.0]))
    merged = train_metrics.merge({"x": a}, {"x": b})
    np.testing.assert_allclose(train_metrics.fetch(merged)["x"], 13 / 3, rtol=1e-6)


def test_entropy_is_that_of_all_ids_together():
    a = train_metrics.entropy(jnp.asarray([4.0, 0.0, 0.0, 0.0]))
    b = train_metrics.entropy(jnp.asarray([0.0, 4.0, 0.0, 0.0]))
    assert train_metrics.fetch({"h": a})["h"] == 0.0
    np.testing.assert_allclose(train_metrics.fetch(train_metrics.merge({"h": a}, {"h": b}))["h"], 1.0, rtol=1e-6)


def test_used_share_counts_over_the_interval():
    a, b = (train_metrics.used_share(jnp.asarray(c)) for c in ([1.0, 0, 0, 0], [0, 3.0, 0, 0]))
    assert train_metrics.fetch({"u": a.merge(b)})["u"] == 0.5


def test_metrics_stay_on_the_device_until_fetched():
    with jax.transfer_guard_device_to_host("disallow"):
        total = train_metrics.merge({"x": train_metrics.mean(jnp.ones(3))}, {"x": train_metrics.mean(jnp.ones(3))})
    assert train_metrics.fetch(total) == {"x": 1.0}


def test_writer_separates_clock_readings_and_drops_what_is_redone(tmp_path):
    writer = train_metrics.Writer(tmp_path)
    for step in (1, 2, 3):
        writer.scalars(step, {"train/loss": step / 2})
        writer.scalars(step, {"timing/seconds": 1.0}, file="timing")
    writer.images(3, {"grid": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "tr')  # torn by a kill
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]]
    assert lines[2] == {"step": 3, "train/loss": 1.5}
    assert "timing" not in (tmp_path / "metrics.jsonl").read_text()
    assert list(tmp_path.glob("events.out.tfevents*"))

    train_metrics.Writer(tmp_path, resume_step=2).close()
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_rates_are_of_the_time_in_steps_and_of_one_device(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(train_metrics.time, "perf_counter", lambda: now[0])
    clock = train_metrics.Throughput(devices=4, peak_flops=1e3)
    clock.count(examples=8, tokens=800, flops=6e3)
    clock.add("evaluation", 2.0)
    now[0] += 5.0
    read = clock.read()
    assert read["timing/examples_per_second"] == pytest.approx(8 / 3)
    assert read["timing/tokens_per_second_per_device"] == pytest.approx(800 / 3 / 4)
    assert read["timing/mfu"] == pytest.approx(6e3 / 3 / 4 / 1e3)
    assert read["timing/evaluation_share"] == pytest.approx(0.4)
    now[0] += 1.0
    assert clock.read()["timing/mfu"] == 0
    assert "timing/mfu" not in train_metrics.Throughput().read()
