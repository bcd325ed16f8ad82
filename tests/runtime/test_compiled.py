"""The folder of compiled programs: whose it is, where, and when there is none."""

import os
import stat

import jax
import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import compiled, distributed
from imagegpt_jax.runtime.cluster import Cluster


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The user's cache folder is a new one, and no variable names a folder of programs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("IMAGEGPT_JAX_CACHE", raising=False)
    monkeypatch.setenv(compiled.VARIABLE, "to be restored")
    monkeypatch.delenv(compiled.VARIABLE)
    monkeypatch.setattr(compiled, "is_default", False)
    return tmp_path / "cache" / "imagegpt_jax" / "compiled"


def test_by_default_it_is_the_users_and_nobody_elses(cache):
    old = os.umask(0)
    try:
        compiled.prepare(default=True)
    finally:
        os.umask(old)
    folder = os.environ[compiled.VARIABLE]
    assert os.path.dirname(folder) == str(cache)
    assert os.path.isdir(folder)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert compiled.is_default


def test_tools_that_measure_compiling_have_none(cache):
    compiled.prepare()
    assert compiled.VARIABLE not in os.environ
    assert not cache.exists()


@pytest.mark.parametrize("chosen", ["", "mine"])
def test_a_choice_stands_and_an_empty_one_is_none(chosen, cache, monkeypatch, tmp_path):
    monkeypatch.setenv(compiled.VARIABLE, chosen and str(tmp_path / chosen))
    compiled.prepare(default=True)
    assert os.environ[compiled.VARIABLE] == (chosen and str(tmp_path / chosen))
    assert not cache.exists()
    assert not compiled.is_default


def test_a_cache_that_cannot_be_written_is_done_without(cache, capsys):
    cache.parent.parent.write_text("a file where a folder should be")
    compiled.prepare(default=True)
    assert compiled.VARIABLE not in os.environ
    assert capsys.readouterr().err == ""


def test_a_read_only_home_is_done_without(cache, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, as whom tests may run, could write
    compiled.prepare(default=True)
    assert compiled.VARIABLE not in os.environ


def test_the_oldest_programs_make_room(cache, monkeypatch):
    compiled.prepare(default=True)
    folder = os.environ[compiled.VARIABLE]
    monkeypatch.delenv(compiled.VARIABLE)
    for age, name in enumerate(["new-cache", "older-cache", "oldest-cache"]):
        path = os.path.join(folder, name)
        with open(path, "wb") as file:
            file.write(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    monkeypatch.setattr(compiled, "LIMIT", 15)
    compiled.prepare(default=True)
    assert os.listdir(folder) == ["new-cache"]


def test_many_processes_do_without_the_default_one(monkeypatch):
    class Joined(Exception):
        pass

    def join(*_, **__):
        raise Joined

    compiled.prepare(default=True)
    monkeypatch.setattr(distributed, "find", lambda: Cluster("localhost:1", 2, 0))
    monkeypatch.setattr(jax.distributed, "initialize", join)
    before = jax.config.jax_compilation_cache_dir
    try:
        with pytest.raises(UserError, match="Joined"):
            distributed.initialize()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_enable_preemption_service", False)
