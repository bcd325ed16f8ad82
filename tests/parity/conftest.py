"""What the parity tests of weights show is collected, and written as docs/weights.md once all of them have passed."""

import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# So that tests can import the references beside them, and the page's tool.
sys.path[:0] = [str(pathlib.Path(__file__).parent), str(ROOT / "tools" / "docs")]
PAGE, KEPT, MEMORY = (ROOT / "docs" / name for name in ("weights.md", "weights.json", "import_memory.json"))
_SHOWN = {}


@pytest.fixture
def shows(request):
    """Call it with a layout and the keys of `weights_page.CHECKS` that the test shows; counts only if the test
    passes.
    """
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
    import weights_page

    from imagegpt_jax.convert.formats import FORMATS

    if set(_SHOWN) != set(FORMATS):
        return
    shown = {name: [key for key in weights_page.CHECKS if key in _SHOWN[name]] for name in FORMATS}
    KEPT.write_text(json.dumps(shown, indent=1) + "\n")
    PAGE.write_text(weights_page.page(shown, json.loads(MEMORY.read_text())))
