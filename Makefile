# `make demo` and `make test` do all the set-up: they need python3 (3.11 or later) with pip, make and git, nothing else.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# TORCH=cpu takes the build of torch without CUDA, which is smaller, from its own index.
TORCH ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH=$(TORCH) is unknown: give TORCH=cpu, or leave it out)
endif
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check
# An environment that happens to be active must not lend its packages to ours.
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV

.PHONY: help demo test test-lower-bounds lint types docs dist format clean

help:
	@echo "make demo    train sgd, local and freeze on real digits; table and runs/demo/report.html"
	@echo "make test    run the tests (ARGS='-m slow': the long ones)"
	@echo "make lint    check style and format       make types   check types"
	@echo "make docs    build the pages              make dist    build the wheel and try it"
	@echo "make format  apply style and format       make clean   remove the environments, caches and demo"
	@echo "make test-lower-bounds  run the tests with the oldest release of each dependency"
	@echo "The first of these makes .venv: 6 GB with torch for CUDA. With TORCH=cpu it is about 4 GB smaller."

# torch and torchvision are resolved in one call: torchvision does not import with another build of torch.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lowcal needs Python 3.11 or later; run: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(VENV)/bin/python || { \
		echo "Setting up $(VENV) once, in about four minutes: $(if $(TORCH),torch for the CPU,6 GB on the disk with \
	torch for CUDA; stop and add TORCH=cpu for about 4 GB less)."; $(PYTHON) -m venv $(VENV); }
	$(if $(TORCH),$(PIP) --index-url $(CPU_INDEX) torch torchvision)
	$(PIP) -e '.[cli,dev]'
	@touch $@

demo: $(STAMP)
	rm -rf runs/demo
	$(VENV)/bin/lowcal compare --recipe digits --out runs/demo

# One process a core, each of one thread: threads that wait for one another on busy cores cost more than they give.
# Neighbouring tests go to one process (worksteal), which shares what they set up.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal $(ARGS)

# The oldest release of each dependency that pyproject.toml admits, in an environment of its own. Old releases cause deprecation
# warnings in the newest releases of what they need themselves.
test-lower-bounds:
	@test -x .venv-lower/bin/python || $(PYTHON) -m venv .venv-lower
	.venv-lower/bin/python -m pip install --disable-pip-version-check --quiet uv
	VIRTUAL_ENV=$(CURDIR)/.venv-lower .venv-lower/bin/uv pip install --quiet --resolution lowest-direct -e '.[cli,dev]'
	OMP_NUM_THREADS=1 .venv-lower/bin/python -m pytest -n auto --dist worksteal -W ignore::DeprecationWarning $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

# The wheel is built from the sdist, and tried in an environment that has it and the packages of .venv.
dist: $(STAMP)
	rm -rf dist
	$(VENV)/bin/python -m build
	$(VENV)/bin/python .ci/check_dist.py dist

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .venv-lower runs/demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
