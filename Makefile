# Each target makes its own virtual environment where it is missing; versions are the tested ones (constraints.txt).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP_BASE := $(VENV)/.hybrimoe-base
STAMP_DEV := $(VENV)/.hybrimoe-dev

.PHONY: demo test lint bench test-ipex clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP_BASE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(STAMP_DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(STAMP_BASE)

demo: $(STAMP_BASE)  ## set up, then stream a text from the demo model and show what ran where
	$(BIN)/hybrimoe generate --prompt "It was a bright morning, and Elizabeth" --max-new-tokens 96 --seed 7

test: $(STAMP_DEV)  ## set up, then run every test
	$(BIN)/python -m pytest -q

lint: $(STAMP_DEV)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP_DEV)  ## the kernel, decode and ablation benchmarks in their short form
	$(BIN)/hybrimoe bench kernels --quick
	$(BIN)/hybrimoe bench decode --quick
	$(BIN)/hybrimoe bench ablation --quick

test-ipex:  ## the IPEX backend's parity suite, in an environment of its own (torch 2.8)
	bash tests/ipex/run.sh

clean:  ## remove the virtual environments and build output
	rm -rf $(VENV) .venv-ipex dist build
