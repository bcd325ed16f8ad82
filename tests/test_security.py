"""Nothing in the package or the tools runs code that it reads, and no name that it reads leaves its folder."""

import ast
import os
import pathlib
import stat

import pytest

from imagegpt_jax import errors
from imagegpt_jax.runtime import compiled

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("imagegpt_jax", "tools", "configs") for p in (ROOT / folder).rglob("*.py"))
# Those that read pickles do it with an allow-list, and are tested by themselves.
RESTRICTED_READERS = {
    "imagegpt_jax/weight_files/torch_file.py",
    "imagegpt_jax/weight_files/torch_pickle.py",
    "imagegpt_jax/weight_files/torch_legacy.py",
    "tools/convert_lpips.py",
}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load"}
FORBIDDEN_CALLS |= {"yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads", "pandas.read_pickle"}


def dotted(node):
    """`a.b.c` of an expression, or "" if it is something else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def findings(source, name="x.py"):
    results = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            bad = {n.split(".")[0] for n in names} & FORBIDDEN_MODULES
            if bad and name not in RESTRICTED_READERS:
                results.append(f"{name}:{line} imports {', '.join(bad)}")
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("extractall", "extract"):
                results.append(f"{name}:{line} unpacks an archive by the names in it")
            if called in FORBIDDEN_CALLS:
                results.append(f"{name}:{line} calls {called}")
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg == "shell" and value is not False:
                    results.append(f"{name}:{line} gives shell=")
                if keyword.arg == "allow_pickle" and value is not False:
                    results.append(f"{name}:{line} gives allow_pickle=")
    return results


def test_no_code_is_run_from_data():
    assert len(SOURCES) > 60
    results = [f for path in SOURCES for f in findings(path.read_text(), str(path.relative_to(ROOT)))]
    assert results == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import torch\ntorch.load('x')",
        "import yaml\nyaml.load('x')",
        "import zipfile\nzipfile.ZipFile('x').extractall()",
        "eval('1')",
        "flag = True\nf(shell=flag)",
    ],
)
def test_the_walk_finds_each(source):
    assert findings(source)


def test_the_compilation_cache_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    old = os.umask(0)
    try:
        compiled.prepare()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_a_cache_that_others_can_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(errors.UserError, match="others may write"):
        compiled.prepare()


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "a/../../outside.png", "..\\outside.png"])
def test_metadata_cannot_name_files_outside_its_folder(name, tmp_path):
    from imagegpt_jax.data import sources

    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(b"secret")
    (folder / "in.png").write_bytes(b"x")
    (folder / "metadata.jsonl").write_text(
        "{" + f'"file_name": "{name.replace(chr(92), chr(92) * 2)}", "text": "a"' + "}"
    )
    with pytest.raises(errors.UserError, match="no image below"):
        sources.open_source(f"folder:{folder}")
