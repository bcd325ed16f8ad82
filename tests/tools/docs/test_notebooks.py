"""The notebooks run from the first cell to the last, at the size of tests."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
NOTEBOOKS = ROOT / "docs" / "notebooks"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a notebook in an empty folder, with some of its text replaced; gives the outputs of its cells."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(name, **replaced):
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            for old, new in replaced.items():
                cell.source = cell.source.replace(old, new)
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
        ).execute()
        return [output for cell in notebook.cells for output in cell.get("outputs", [])]

    return run


def pictures(outputs):
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_first_steps(run, workdirs):
    outputs = run("first_steps", **{"../../runs/demo/decoder": str(workdirs.decoder)})
    assert len(pictures(outputs)) == 5


def test_train_on_a_folder(run):
    outputs = run("train_on_a_folder", **{'"emoji"': '"test"'})
    assert len(pictures(outputs)) == 1
    assert "validation/psnr" in "".join(output.get("text", "") for output in outputs)
