"""Reference programs that are installed without what they depend on (see the Makefile)."""

import importlib.util
import pathlib
import types

import numpy as np
import pytest

TOOLS = pathlib.Path(__file__).resolve().parents[3] / "tools" / "golden"


def _tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def programs():
    """The tool `reference_programs`."""
    return _tool("reference_programs")


@pytest.fixture(scope="session")
def fidelity(programs):
    """torch-fidelity and clean-fid: `fidelity.torch_fidelity`, `fidelity.cleanfid`."""
    return programs.fidelity()


@pytest.fixture(scope="session")
def inception(programs, fidelity, tmp_path_factory):
    """`path`, a file of random weights of the FID Inception as torch.save writes it, and torch-fidelity's `network`."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    programs.save_torch(programs.random_inception(0), path)
    return types.SimpleNamespace(path=path, network=programs.torch_inception(fidelity, path))


@pytest.fixture(scope="session")
def pictures():
    """uint8 [64, 64, 64, 3]: random pictures of which the second half is paler."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (64, 8, 8, 3))
    fine = coarse.repeat(8, axis=1).repeat(8, axis=2) + rng.normal(0, 12, (64, 64, 64, 3))
    fine[32:] = 100 + 0.5 * fine[32:]
    return fine.clip(0, 255).astype(np.uint8)
