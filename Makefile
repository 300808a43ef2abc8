# Each target makes its own virtual environment where it is missing; versions are the tested ones (constraints.txt).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Where PYTHONDONTWRITEBYTECODE is set, each start would compile all modules of a checkout.
COMPILE = $(BIN)/python -m compileall -q hybrimoe scheduler cpu_kernels gpu_kernels yaml_rules
STAMP_BASE := $(VENV)/.hybrimoe-base
STAMP_DEV := $(VENV)/.hybrimoe-dev

# Tests run in as many processes as there are cores, but not more than 4 (about 1.5 GB of memory each); WORKERS=0: in one.
WORKERS ?= auto
PARALLEL := -n $(WORKERS) --maxprocesses 4 --dist worksteal
SHORT := not slow and (not families or representative)

STAMP_BROWSER := $(VENV)/.hybrimoe-browser

STAMP_FLOOR := .venv-floor/.hybrimoe-floor
FLOOR := .venv-floor/bin/python

STAMP_API := $(VENV)/.hybrimoe-api
EXAMPLES ?= 40

.PHONY: demo test test-fast test-all test-api test-browser pictures test-floor coverage lint bench soak gpu-check test-ipex clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP_BASE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e .
	@$(COMPILE)
	@touch $@

$(STAMP_DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@$(COMPILE)
	@touch $@ $(STAMP_BASE)

demo: $(STAMP_BASE)  ## set up, then stream a text from the demo model and show what ran where
	$(BIN)/hybrimoe generate --prompt "It was a bright morning, and Elizabeth" --max-new-tokens 96 --seed 7

test: $(STAMP_DEV)  ## set up, then run the tests, with six of the model families, without the slow ones
	$(BIN)/python -m pytest -q $(PARALLEL) -m "$(SHORT)"

test-fast: $(STAMP_DEV)  ## what a change is tried with: the scheduler, rules, configuration and checkpoints
	$(BIN)/python -m pytest -q -m "not families" tests/scheduler tests/yaml_rules tests/hybrimoe/config \
	  tests/test_dependency_direction.py

test-all: $(STAMP_DEV)  ## every test, the slow ones too, with every model family of transformers (what CI runs)
	$(BIN)/python -m pytest -q $(PARALLEL)

$(STAMP_API): $(STAMP_DEV)
	$(PIP) install -q -c constraints.txt schemathesis
	@touch $@

test-api: $(STAMP_API)  ## requests that schemathesis makes of the OpenAPI document, about two minutes (EXAMPLES=40 to each)
	EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -p no:xdist tests/hybrimoe/server/test_schemathesis.py

$(STAMP_BROWSER): $(STAMP_DEV)
	$(PIP) install -q -c constraints.txt -e '.[browser]'
	@touch $@

test-browser: $(STAMP_BROWSER)  ## the server's page in Chromium (the system's: apt-get install chromium), a minute
	$(BIN)/python -m pytest -q -m browser tests/hybrimoe/server/browser

pictures: $(STAMP_BROWSER)  ## docs/pictures of the page, anew: starts a server and looks at it in Chromium
	$(BIN)/python benchmarks/page_pictures.py

$(STAMP_FLOOR): pyproject.toml constraints.txt $(STAMP_DEV)
	$(PYTHON) -m venv .venv-floor
	echo '*' >.venv-floor/.gitignore
	$(BIN)/uv pip compile -q --resolution lowest-direct --extra onnx --extra serve --extra fast-serve \
	  --extra otel --extra bench --extra images pyproject.toml -o .venv-floor/requirements.txt
	grep -E '^(pytest|pytest-randomly|pytest-xdist|hypothesis|jsonschema)==' constraints.txt >.venv-floor/tools.txt
	$(BIN)/uv pip install -q --python $(FLOOR) -r .venv-floor/requirements.txt -r .venv-floor/tools.txt
	@touch $@

test-floor: $(STAMP_FLOOR)  ## the tests with the lowest versions that pyproject.toml allows (torch 2.8: 7 GB of disk)
	PYTHONPATH="$(CURDIR)" $(FLOOR) -m pytest -q $(PARALLEL) -m "$(SHORT)" -W default

coverage: $(STAMP_DEV)  ## the tests with line and branch coverage; functions that Numba compiled are not seen
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not families or representative" --cov --cov-report=term

lint: $(STAMP_DEV)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP_DEV)  ## the kernel, decode and ablation benchmarks in their short form
	$(BIN)/hybrimoe bench kernels --quick
	$(BIN)/hybrimoe bench decode --quick
	$(BIN)/hybrimoe bench ablation --quick

soak: $(STAMP_DEV)  ## a server under mixed load for 3 minutes; exit code 1 if anything is lost (ARGS="--minutes 30": a night)
	$(BIN)/hybrimoe bench soak $(ARGS)

gpu-check: $(STAMP_DEV)  ## on a machine with a card: the acceptance kit, at most 9 minutes (ARGS="--quick": 3)
	$(BIN)/hybrimoe doctor --gpu $(ARGS)

test-ipex:  ## the IPEX backend's parity suite, in an environment of its own (torch 2.8)
	bash tests/ipex/run.sh

clean:  ## remove the virtual environments and build output
	rm -rf $(VENV) .venv-ipex .venv-floor dist build
