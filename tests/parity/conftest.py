"""What the parity tests of weights show is collected, and written as docs/weights.md once all of them have passed."""

import json
import pathlib
import sys

import pytest

# So that tests can import the references beside them.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE, KEPT, MEMORY = (ROOT / "docs" / name for name in ("weights.md", "weights.json", "import_memory.json"))
_SHOWN = {}


@pytest.fixture
def shows(request):
    """Call it with a layout and the keys of `matrix.CHECKS` that the test shows; counts only if the test passes."""
    noted = []

    def note(layout, *checks):
        noted.append((layout, checks))

    yield note
    if getattr(request.node, "passed", False):
        for layout, checks in noted:
            _SHOWN.setdefault(layout, set()).update(checks)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "call":
        item.passed = outcome.get_result().passed


def pytest_sessionfinish(session, exitstatus):
    """Writes the page if the whole matrix was run and nothing failed."""
    if exitstatus or not _SHOWN:
        return
    from imagegpt_jax.convert import matrix
    from imagegpt_jax.convert.formats import FORMATS

    if set(_SHOWN) != set(FORMATS):
        return
    shown = {name: [key for key in matrix.CHECKS if key in _SHOWN[name]] for name in FORMATS}
    KEPT.write_text(json.dumps(shown, indent=1) + "\n")
    PAGE.write_text(matrix.page(shown, json.loads(MEMORY.read_text())))
