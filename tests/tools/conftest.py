import importlib.util
import pathlib
import sys

import pytest
from absl import flags

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def load_tool(monkeypatch):
    """Imports a tool afresh and sets its flags: `load_tool("scale/plan.py", "--slices=2").main()`.

    A tool's folder is on the path, as it is for the tool. Its flags go again with the test, by `load_tool.forget()` and
    when the next tool is loaded: several have flags of one name.
    """
    defined = set()

    def forget():
        for name in defined:
            delattr(flags.FLAGS, name)
        defined.clear()

    def load(path, *arguments):
        forget()
        file = TOOLS / path
        monkeypatch.syspath_prepend(str(file.parent))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, module)  # where absl and dataclasses look a module up
        before = set(flags.FLAGS)
        spec.loader.exec_module(module)
        defined.update(set(flags.FLAGS) - before)
        if arguments:
            flags.FLAGS([file.stem, *map(str, arguments)])
        return module

    load.forget = forget
    yield load
    forget()
