# Everything sets itself up: a virtual environment in the tree, then pip. Needs python3 (3.11 or newer) and venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Files of tests side by side: compiling, most of the time, takes one core.
SIDE := -n logical --maxprocesses 4 --dist loadfile
TYPES := --jaxtyping-packages=pangu_jax,infer,train,beartype.beartype

# Of a machine whose Python has JAX for CUDA already: nothing is installed there.
GPU := JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION=0.95

.PHONY: help demo test test-slow check bench-gpu format clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r n t; do printf '  make %-10s %s\n' "$$n" "$$t"; done

demo: $(READY)  ## train a nano model to think fast and slow, and examine it (some minutes; ARGS="--model nano-moge")
	$(BIN)/pangu-train demo $(ARGS)

test: $(READY)  ## the test suite without the slow tests
	$(BIN)/python -m pytest -m "not slow" $(SIDE) $(TYPES) $(ARGS)

test-slow: $(READY)  ## the slow tests: gigabytes of weights, minutes of CPU
	$(BIN)/python -m pytest -m slow $(SIDE) $(ARGS)

check: $(READY)  ## lint, formatting, types, and the layering of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q tests/test_layering.py

bench-gpu:  ## an NVIDIA GPU: its kernels tested, and they and whole models measured (minutes; PYTHON has JAX for CUDA)
	$(GPU) $(PYTHON) -m pytest -q tests/pangu_jax/kernels/test_mosaic_experts.py tests/pangu_jax/kernels/test_mosaic_attention.py
	$(GPU) PANGU_JAX_MOSAIC=1 $(PYTHON) -m infer.bench.gpu operations $(ARGS)
	for kernels in 0 1; do $(GPU) PANGU_JAX_MOSAIC=$$kernels $(PYTHON) -m infer.bench.gpu models $(ARGS) || exit; done

format: $(READY)  ## format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and what runs left behind
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis runs

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is not Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): once, a minute or two ..."
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; on Debian: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $(READY)
