# Two commands on a fresh machine: `make demo` and `make test`. PIP_ARGS reaches pip, e.g. for an index of CPU-only torch.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
PYTEST_ARGS ?=
# The tests run on every core: two workers at least, since many wait, and four at most, each of which takes 1.5 GB.
# PYTEST_ARGS comes after: "-n 8" for more, "-n 0" for none, e.g. with a debugger.
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS := $(shell echo $$(( $(CORES) < 2 ? 2 : $(CORES) > 4 ? 4 : $(CORES) )))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test coverage guard lint format install install-dev check-python clean

help:
	@echo "make demo     install into $(VENV), replay the bundled clip, evaluate it, write out/demo/"
	@echo "make test     install the development tools, run the tests"
	@echo "make coverage run the tests and demand 85 % of the lines of vo and frontends"
	@echo "make guard    hold accuracy, losses and relative speed to benchmarks/bands.yaml"
	@echo "make lint     ruff and mypy"
	@echo "make format   let ruff format and fix what it can"
	@echo "make clean    remove $(VENV) and caches (results in out/ stay)"

demo: install
	$(BIN)/vo run demo --config demo --output out/demo --publish off --fallback-orb

test: install-dev
	$(PYTEST) $(PYTEST_ARGS)

coverage: install-dev
	$(PYTEST) --cov=vo --cov=frontends --cov-report=term:skip-covered --cov-fail-under=85 $(PYTEST_ARGS)

guard: install-dev
	$(BIN)/python tools/regression_guard.py

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lightvo needs Python 3.11 or newer; name one: make demo PYTHON=python3.12"; exit 2; }

$(BIN)/python: | check-python
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "no virtual environment could be made: install your system's venv package (Debian: python3-venv)"; exit 2; }

# The installation compiles vo/kernels.c, where there is a C compiler.
INSTALLED_FROM := pyproject.toml constraints.txt vo/kernels.c tools/build_kernels.py

$(VENV)/.installed: $(INSTALLED_FROM) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(INSTALLED_FROM) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,record]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist vo/lightvo_kernels.so
