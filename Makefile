# make demo     train, sample and evaluate on the built-in pictures (about 10 minutes on two CPU cores)
# make test     every test that a user needs
# make lint     formatter, linter, type checker, and the layers of the package
# make docs     the documentation as a site, in site/index.html
# make parity   comparisons with PyTorch references (installs torch)
# make scale    compile every preset for TPU slices, keep docs/scale.json and docs/scale.md (installs libtpu; an hour)
# make scale-check   recompile one small cell and compare it with what is kept (a minute or two)
# make chaos         kill real trainings six times, compare with undisturbed ones (a few minutes)
# make package-check   build the wheel, install it alone, train to evaluate from an empty folder (a few minutes)
# make gpu-check     both trainings and sampling on the GPUs of this machine, with throughput and memory
# make format   rewrite the sources in the project's format
#
# The environment is made in $(VENV) with $(PYTHON); an existing one is used as it is.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
SOURCES := imagegpt_jax configs tests tools

.PHONY: demo test lint docs parity scale scale-check chaos package-check lock gpu-check format setup clean

setup: $(VENV)/.stamp-base

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("imagegpt_jax needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of dependencies, so that a target installs only what it needs, once.
$(VENV)/.stamp-base: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-base
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-base
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/.stamp-parity: $(VENV)/.stamp-dev
	$(BIN)/python -m pip install --quiet --editable '.[dev,parity]'
	$(BIN)/python -m pip install --quiet --no-deps torch-fidelity==0.4.0 clean-fid==0.1.35 lpips==0.1.4
	touch $@

$(VENV)/.stamp-scale: $(VENV)/.stamp-base
	$(BIN)/python -m pip install --quiet --editable '.[scale]'
	touch $@

demo: $(VENV)/.stamp-base
	$(BIN)/imagegpt-jax demo --output=runs/demo

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --ignore=tests/parity

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache --no-logo

docs: $(VENV)/.stamp-docs
	$(BIN)/python tools/docs/site_sources.py --output=build/docs
	$(BIN)/zensical build --strict --clean

parity: $(VENV)/.stamp-parity
	$(BIN)/python -m pytest tests/parity

scale: $(VENV)/.stamp-scale
	$(BIN)/python tools/scale/scale.py

scale-check: $(VENV)/.stamp-scale
	$(BIN)/python tools/scale/scale.py --check

chaos: $(VENV)/.stamp-base
	$(BIN)/python tools/robustness/chaos.py --kills=6

package-check: $(VENV)/.stamp-dev
	$(BIN)/python tools/check_package.py

# What the tests last passed with, for one who wants the same versions: pip install -c requirements-dev.lock -e '.[dev]'
lock: $(VENV)/.stamp-dev
	$(BIN)/uv pip compile --quiet --universal --python-version=3.11 --extra=dev --no-annotate --upgrade \
	  --custom-compile-command='make lock' --output-file=requirements-dev.lock pyproject.toml

gpu-check: $(VENV)/.stamp-base
	$(BIN)/python tools/gpu_check.py --output=gpu.json

format: $(VENV)/.stamp-dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf build dist site .pytest_cache .ruff_cache *.egg-info
