import functools
import importlib
import os
import pathlib
import shutil
import sys
import tempfile
import types

import pytest
from absl import flags

# Before JAX is imported: tests run on the CPU, whatever the machine has.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile many programs and run each for a moment: without LLVM's optimizations that takes a third of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# The same programs come again in other tests and in the processes that they start: they are compiled once. Workers of
# pytest-xdist begin with the environment of the process that starts them, and share its folder.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="imagegpt_jax-tests-")
COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def pytest_configure(config):
    if not IS_WORKER:
        config.add_cleanup(lambda: shutil.rmtree(COMPILED, ignore_errors=True))


@pytest.fixture(scope="session")
def workdirs(tmp_path_factory):
    """Workdirs as training leaves them, of networks of random numbers, with checkpoints of steps 1 and 2.

    `tokenizer`; `decoder`, of captions, over that tokenizer; `classes`, of classes, over an untrained tokenizer.
    """
    root = tmp_path_factory.mktemp("workdirs")
    runs = types.SimpleNamespace(tokenizer=root / "tokenizer", decoder=root / "decoder", classes=root / "classes")
    _write_run(_config("tokenizer"), runs.tokenizer)
    config = _config("decoder")
    config.tokenizer = str(runs.tokenizer)
    _write_run(config, runs.decoder)
    config = _config("decoder")
    config.data.use_labels, config.data.text_length = True, 1
    _write_run(config, runs.classes)
    return runs


def _config(task):
    from imagegpt_jax import config as config_lib

    config = config_lib.sibling(str(CONFIGS / "x.py"), f"{task}.py").get_config("size=test")
    config.data.train = config.data.validation = "emoji:validation,res=16,styles=noto"
    return config


def _write_run(config, workdir):
    import jax
    import numpy as np

    from imagegpt_jax import checkpoint
    from imagegpt_jax import config as config_lib
    from imagegpt_jax.tasks import interface

    task = interface.find(config.task)
    setup = task.setup(config)
    config = setup.config
    shapes = jax.eval_shape(functools.partial(task.init_state, setup), jax.eval_shape(jax.random.key, 0))
    rng = np.random.default_rng(0)
    config_lib.save(config, workdir)
    task.save_assets(setup, workdir)
    checkpoints = checkpoint.Checkpoints(workdir, config)
    for step in (1, 2):
        # Random numbers need no compiled initialisation, which would take most of the tests' time.
        state = jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(x.dtype), shapes)
        checkpoints.save(step, state, position=0)
    checkpoints.close()


@pytest.fixture
def binary():
    """Imports a binary afresh and sets its flags: `binary("sample", "--seed=1").main()`."""

    def forget():
        # Binaries have flags of the same name, which absl does not allow in one process.
        for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
            for flag in list(defined) if module.startswith("imagegpt_jax.") else ():
                if flag.name in flags.FLAGS:
                    delattr(flags.FLAGS, flag.name)

    def load(name, *arguments):
        forget()
        sys.modules.pop(f"imagegpt_jax.{name}", None)
        module = importlib.import_module(f"imagegpt_jax.{name}")
        if arguments:
            flags.FLAGS([name, *map(str, arguments)])
        return module

    yield load
    forget()
