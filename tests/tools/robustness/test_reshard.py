import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_a_few_pairs_of_meshes(tmp_path):
    command = [sys.executable, "tools/robustness/reshard.py", "--pairs=3", f"--output={tmp_path / 'pairs.json'}"]
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "pairs.json").read_text())
    assert {task: (c["pairs"], c["different"]) for task, c in results.items()} == {
        "tokenizer": (3, []),
        "decoder": (3, []),
    }
    assert all(c["meshes"] > 20 for c in results.values())
