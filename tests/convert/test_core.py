"""The engine: rules match both ways, and whatever does not fit is listed by name."""

import re

import numpy as np
import pytest

from imagegpt_jax.convert import core
from imagegpt_jax.errors import UserError
from imagegpt_jax.weight_files.tensor import Tensor

TABLE = [
    core.rule("wte.weight", "embed.weight"),
    core.rule("h.{i}.{part:q|k}.weight", "blocks.{i}.{part}.weight", core.LINEAR),
    core.rule("h.{i}.fused", ["blocks.{i}.up", "blocks.{i}.gate"], core.cut((2, 3), 0)),
    core.rule(["codes", "classes"], "table", core.join((4, 1), 0)),
    *core.carry("h.{i}.counter"),
    *core.drop("h.{i}.bias"),
]
rng = np.random.default_rng(0)
THEIRS = {
    "wte.weight": rng.standard_normal((3, 2)),
    "h.0.q.weight": rng.standard_normal((4, 5)),
    "h.11.k.weight": rng.standard_normal((4, 5)),
    "h.0.fused": rng.standard_normal((5, 2)),
    "codes": rng.standard_normal((4, 2)),
    "classes": rng.standard_normal((1, 2)),
    "h.3.counter": np.int64(7),
}
OURS = {
    "embed.weight": (3, 2),
    "blocks.0.q.weight": (5, 4),
    "blocks.11.k.weight": (5, 4),
    "blocks.0.up": (2, 2),
    "blocks.0.gate": (3, 2),
    "table": (5, 2),
}


def lazy(arrays):
    return {name: Tensor(np.shape(a), np.asarray(a).dtype, lambda a=a: np.asarray(a)) for name, a in arrays.items()}


def convert(theirs=THEIRS, table=TABLE, ours=OURS):
    return dict(core.convert(table, lazy(theirs), ours, "the file"))


def test_rules_rename_cut_join_transpose_and_carry():
    out = convert({**THEIRS, "h.0.bias": np.zeros(3)})
    assert set(out) == {*OURS, "carried.h.3.counter"}
    np.testing.assert_array_equal(out["blocks.11.k.weight"], THEIRS["h.11.k.weight"].T)
    np.testing.assert_array_equal(out["blocks.0.gate"], THEIRS["h.0.fused"][2:])
    np.testing.assert_array_equal(out["table"][4:], THEIRS["classes"])


def test_the_inverse_table_gives_the_same_bits():
    out = convert()
    back = core.invert(TABLE)
    jobs = core.plan(back, out, None, "ours")
    written = {name: array for job in jobs for name, array in job.run(lazy(out))}
    assert set(written) == set(THEIRS)
    for name, array in THEIRS.items():
        assert np.asarray(written[name]).tobytes() == np.asarray(array).tobytes(), name


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


@pytest.mark.parametrize(
    ("theirs", "table", "ours", "message"),
    [
        ({**THEIRS, "new": np.zeros(1)}, TABLE, OURS, "names in the file that no rule knows: new"),
        (without(THEIRS, "classes"), TABLE, OURS, "names that are missing in the file: classes"),
        (THEIRS, [*TABLE, core.rule("w{x:.+}", "other.{x}")], OURS, "names that several rules know: wte.weight"),
        (THEIRS, TABLE, {**OURS, "norm": (2,)}, "parameters that nothing in the file fills: norm"),
        (THEIRS, TABLE, without(OURS, "table"), "parameters that the network does not have: table"),
        (
            {**THEIRS, "wte2": np.zeros((3, 2))},
            [*TABLE, core.rule("wte2", "embed.weight")],
            OURS,
            "parameters that are filled twice: embed.weight",
        ),
        (THEIRS, TABLE, {**OURS, "table": (5, 3)}, r"codes, classes gives table the shape \(5, 2\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_listed(theirs, table, ours, message):
    with pytest.raises(UserError, match=message):
        convert(theirs, table, ours)


def test_both_sides_are_listed_at_once():
    theirs = {("renamed" if k == "wte.weight" else k): v for k, v in THEIRS.items()}
    with pytest.raises(UserError, match=r"no rule knows: renamed; .*nothing in the file fills: embed\.weight"):
        convert(theirs)


def test_long_lists_are_cut():
    with pytest.raises(UserError, match=re.escape("x0, x1, x10, x11, x2, x3, x4, x5 and 4 more")):
        convert({**THEIRS, **{f"x{i}": np.zeros(1) for i in range(12)}})


def test_nothing_is_read_before_everything_fits():
    def fail():
        raise AssertionError("read")

    tensors = {name: Tensor(np.shape(a), np.asarray(a).dtype, fail) for name, a in THEIRS.items()}
    with pytest.raises(UserError):
        core.convert(TABLE, tensors, {**OURS, "norm": (2,)}, "the file")
