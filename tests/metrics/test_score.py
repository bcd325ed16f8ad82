"""The table of metrics: each entry whole, and metrics from outside the package."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import metric, networks, protocols, score, sets, ssim
from imagegpt_jax.metrics.feature_statistics import CLASSES, MOMENTS, ROWS, VALUES
from imagegpt_jax.metrics.features import Network
from imagegpt_jax.metrics.set_scorer import SetScorer

OUTSIDE = """
import jax.numpy as jnp
import numpy as np

from imagegpt_jax.metrics.metric import Metric, of_pairs, of_values, result


def _brightness(x):
    return of_values(x.rows.block(0, len(x.rows)).mean(axis=1), note="of all channels")


def _farther(x):
    means = [table.block(0, len(table)).mean() for table in (x.rows, x.reference_rows)]
    return result(abs(means[0] - means[1]), x.images.count)


def largest(a, b):
    return jnp.max(jnp.abs(a - b), axis=(1, 2, 3))


BRIGHTNESS = Metric(_brightness, "pool", reference="")
FARTHER = Metric(_farther, "pool", lower_is_better=True)
LARGEST = Metric(of_pairs, form="values", reference="pairs", compare=largest, lower_is_better=True)
NOTHING = 3
"""


def means(params, images):
    return {"pool": images.astype(jnp.float32).mean(axis=(1, 2)) * params}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside_metrics.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    network = Network("efficientnet_lite0", {}, np.asarray, means, np.float32(1))
    monkeypatch.setattr(networks, "LOADERS", {"efficientnet_lite0": lambda path, resize: network})
    return [f"outside_metrics:{name}" for name in ("BRIGHTNESS", "FARTHER", "LARGEST")]


def test_metrics_of_a_users_own_are_computed_beside_ours(outside):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 8, 8, 3)).astype(np.uint8)
    images, reference = (sets.InMemory(name, part) for name, part in zip("ab", pixels, strict=True))
    scorer = SetScorer(["kid", *outside], protocols.find("emoji"), {})
    gathered = scorer.gather("images", images)
    gathered.values = scorer.gather("pairs", _Pairs(images, reference)).values
    scores = scorer.scores(gathered, scorer.gather("reference", reference))
    assert list(scores) == ["kid", *outside]
    brightness, farther, largest = (scores[name] for name in outside)
    assert brightness["value"] == pytest.approx(pixels[0].mean(), rel=1e-5)
    assert (brightness["n"], brightness["note"], brightness["interval_of"]) == (9, "of all channels", "normal, 95%")
    assert farther["value"] == pytest.approx(abs(pixels[0].mean() - pixels[1].mean()), rel=1e-3)
    difference = np.abs(pixels[0].astype(int) - pixels[1])
    assert largest["value"] == pytest.approx(difference.max(axis=(1, 2, 3)).mean())


class _Pairs(sets.InMemory):
    """Two sets as pairs, without files."""

    def __init__(self, images, reference):
        both = np.stack([np.stack([x.read(i) for x in (images, reference)]) for i in range(len(images))])
        super().__init__("pairs", both)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kdi", "unknown metric 'kdi'. Did you mean 'kid'"),
        ("outside_metrics:BRIGHT", "cannot be imported"),
        ("no_such_module:X", "cannot be imported"),
        ("outside_metrics:NOTHING", "is a int: make it an imagegpt_jax.metrics.metric.Metric"),
    ],
)
def test_metrics_that_there_are_not(outside, name, words):
    with pytest.raises(UserError, match=words):
        score.check_metrics([name])


@pytest.mark.parametrize(
    ("half", "words"),
    [
        ({"form": "moment"}, "no metric has form='moment'"),
        ({"form": CLASSES, "reference": "images"}, "no metric has form='classes' and reference='images'"),
        ({"form": MOMENTS, "reference": "captions"}, "no metric has form='moments'"),
        ({"form": ROWS, "output": ""}, "which output of a network"),
        ({"form": VALUES, "reference": "pairs"}, "has compare=FUNCTION"),
        ({"form": ROWS, "compare": ssim.ssim}, "and no other, has compare"),
        ({"compute": "kid"}, "computed by a function of Inputs"),
    ],
)
def test_half_declared_metrics_are_refused(half, words):
    with pytest.raises(UserError, match=words):
        metric.Metric(**{"compute": metric.of_pairs, "output": "pool", **half})


def test_entries_of_the_table_are_found_by_their_names_and_ssim_fits_into_the_smallest_image():
    for name, entry in score.METRICS.items():
        assert score.find(name) is entry
        assert dataclasses.replace(entry) == entry  # checks it again
    assert score.METRICS["ssim"].min_side == ssim.WINDOW
    assert score.METRICS["ms_ssim"].min_side == 16 * ssim.WINDOW
    assert {name for name, entry in score.METRICS.items() if entry.lower_is_better} == {
        *("fid", "sfid", "kid", "fd_dinov2", "cmmd", "lpips")
    }
