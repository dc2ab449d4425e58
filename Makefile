# Everything that working on jaxbound needs. Each environment is installed once, and again when pyproject.toml changes.
#
#   make certify      on a fresh machine: install, train and certify a small digits network
#   make test         the tests of every day; ROOM=regions for those of one room
#   make test-fast    a subset of a minute, to run after each change
#   make test-all     all tests but the long soundness runs: what CI runs
#   make test-latest  a fast subset on Python 3.12 and the newest JAX
#   make soundness    the long soundness runs
#   make fuzz         random programs: SECONDS=60 SEED=0, goes on where the last run of the seed ended
#   make lint         format, lint and types
#   make bench        timings
#   make docs         the documentation; NOTEBOOKS=off does not execute the notebooks
#   make package      the sdist and the wheel in dist/, checked, and the README's example in a clean environment

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=
ROOM    ?=
NOTEBOOKS ?= auto
SECONDS ?= 60
SEED    ?= 0

VENV   := .venv
LATEST := .venv-latest
BIN    := $(VENV)/bin

# Python compiles the files that it imports; compiling all of them takes longer than the installation.
INSTALL := -m pip install -qq --disable-pip-version-check --no-compile

# Tests of the oracles and of the experiments must run, not be skipped, so their extras are installed too.
TEST_EXTRAS := test,exact,experiments

# A python3.12 that runs: on the path (a pyenv shim may be there and refuse), or among pyenv's own versions.
FIND_PYTHON_312 = for candidate in python3.12 "$$(pyenv root 2>/dev/null)"/versions/3.12*/bin/python; do \
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; \
	then echo "$$candidate"; break; fi; done

.PHONY: help certify test test-fast test-all lint soundness fuzz bench docs package install-latest test-latest clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

certify: $(VENV)/installed-experiments
	$(BIN)/python -m experiments.digits $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not long" $(if $(ROOM),--room $(ROOM)) $(ARGS)

test-fast: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) -m "fast and not slow and not long" -k "not adversarial and not execution" tests $(ARGS)

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) $(if $(ROOM),--room $(ROOM)) $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

soundness: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) -m slow --hypothesis-profile=thorough $(ARGS) tests

fuzz: $(VENV)/installed-test
	$(BIN)/python -m fuzzing --seconds $(SECONDS) --seed $(SEED) $(ARGS)

bench: $(VENV)/installed-test
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/installed-docs
	$(BIN)/sphinx-build -W --keep-going -b html -D nb_execution_mode=$(NOTEBOOKS) docs docs/_build/html
	$(BIN)/python docs/links.py docs/_build/html

package: $(VENV)/installed-package
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	.ci/try_wheel dist/*.whl $(BIN)/python

install-latest test-latest:
	@python="$$($(FIND_PYTHON_312))"; \
	if [ -z "$$python" ]; then echo "$@: no Python 3.12 here, nothing done"; \
	else $(MAKE) --no-print-directory run-$@ PYTHON_312="$$python"; fi

.PHONY: run-install-latest run-test-latest
run-install-latest: $(LATEST)/installed
run-test-latest: $(LATEST)/installed
	@$(LATEST)/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "with JAX", jax.__version__)'
	$(LATEST)/bin/python -m pytest -n $(WORKERS) -m "fast and not slow" $(ARGS)

clean:
	rm -rf $(VENV) $(LATEST) docs/_build .pytest_cache .ruff_cache .hypothesis .fuzz

# --- environments -----------------------------------------------------------------------------------------------------

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxbound needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-experiments: pyproject.toml | $(VENV)/pyvenv.cfg
	$(BIN)/python $(INSTALL) -e '.[experiments]'
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/pyvenv.cfg
	$(BIN)/python $(INSTALL) -e '.[$(TEST_EXTRAS)]'
	@touch $@

$(VENV)/installed-docs: pyproject.toml | $(VENV)/pyvenv.cfg
	$(BIN)/python $(INSTALL) -e '.[docs]'
	@touch $@

$(VENV)/installed-package: pyproject.toml | $(VENV)/pyvenv.cfg
	$(BIN)/python $(INSTALL) -e '.[package]'
	@touch $@

$(LATEST)/installed: pyproject.toml
	$(PYTHON_312) -m venv $(LATEST)
	$(LATEST)/bin/python $(INSTALL) --upgrade -e '.[test]'
	@touch $@
