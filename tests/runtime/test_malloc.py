"""A process on the processor keeps its memory: no page of a program's working memory is cleared twice."""

import ctypes
import os
import pathlib
import subprocess
import sys

import pytest

from imagegpt_jax.runtime import malloc

# Prints how many pages the runs of a program with 256 MB of working memory find missing, after the first ones.
PROGRAM = """
import resource, sys
from imagegpt_jax.runtime import distributed, malloc
{"keep": malloc.keep, "join": distributed.initialize, "leave": int}[sys.argv[1]]()
import jax, jax.numpy as jnp
x = jnp.ones((8192, 64))
run = jax.jit(lambda x: jnp.sum(x @ x.T @ x))
for _ in range(3):
    run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    run(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def missing(how: str, **variables: str) -> float:
    """Share of the pages of the working memory that three runs find missing."""
    settings = ("MALLOC_", "GLIBC_", "XLA_", malloc.KEEP)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(settings)}
    environment |= {"JAX_PLATFORMS": "cpu", **variables}
    ran = subprocess.run([sys.executable, "-c", PROGRAM, how], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout) / (3 * 8192 * 8192 * 4 / os.sysconf("SC_PAGESIZE"))


glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not the GNU C library")


@glibc
@pytest.mark.parametrize("how", ["keep", "join"])
def test_pages_are_kept(how):
    assert missing(how) < 0.02


@glibc
@pytest.mark.parametrize(("how", "variables"), [("leave", {}), ("join", {malloc.KEEP: "0"})])
def test_pages_are_not_kept_otherwise(how, variables):
    huge = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[always]" in huge.read_text():
        pytest.skip("pages are huge here, and few")
    assert missing(how, **variables) > 0.5


@pytest.mark.parametrize(
    ("platforms", "driver", "expected"),
    [("cpu", True, True), ("cpu,cuda", True, True), ("tpu,cpu", False, False), ("", False, True), ("", True, False)],
)
def test_on_processor(monkeypatch, tmp_path, platforms, driver, expected):
    if driver:
        (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(malloc, "_ACCELERATORS", (str(tmp_path / "accel*"), str(tmp_path / "nvidia[0-9]*")))
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert malloc.on_processor() == expected
    if not expected:
        assert not malloc.keep()
