import importlib.util
import pathlib
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 900


@pytest.fixture
def tool():
    from absl import flags

    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    sys.modules["plan"] = module = importlib.util.module_from_spec(spec)  # where absl looks who defines a flag
    spec.loader.exec_module(module)
    yield module
    del sys.modules["plan"]
    for flag in list(flags.FLAGS.flags_by_module_dict()["plan"]):
        delattr(flags.FLAGS, flag.name)


def search(tool, peak):
    """A search whose compiler is a function of batch and remat."""
    config = types.SimpleNamespace(mesh={"data": 1, "fsdp": -1, "tensor": 1}, accumulate=1)
    chip = types.SimpleNamespace(hbm_bytes=LIMIT)
    found = tool.Search(config, types.SimpleNamespace(chip=chip, chips=4), 1.0)

    def compiled(per_device, remat):
        found.tried[per_device, remat] = peak(per_device)
        return peak(per_device)

    found.peak = compiled
    return found


@pytest.mark.parametrize(
    ("peak", "largest", "most"),
    [
        (lambda b: 100 + 8 * b, 100, 6),  # a straight line
        (lambda b: max(300, 100 + 2 * b), 400, 10),  # small batches peak elsewhere
        (lambda b: max(300, 100 + 2 * b) if b < 300 else None, 299, 20),  # the compiler gives up below the limit
        (lambda b: 100 + b * b // 50, 200, 16),  # a curve
        (lambda b: 890 + 10 * b, 1, 3),
        (lambda b: LIMIT + b, 0, 1),
        (lambda b: None, 0, 1),
    ],
)
def test_the_largest_batch_is_found_in_few_compilations_and_the_next_was_tried(tool, peak, largest, most):
    found = search(tool, peak)
    assert found.largest("full") == largest
    assert (largest + 1, "full") in found.tried
    assert len(found.tried) <= most
