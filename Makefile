# Every target sets up what it needs in .venv; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_DIR ?= demo
export PYTHONUNBUFFERED := 1

.PHONY: help
help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# torch first and alone: the constraint picks one build, and nothing installed later can swap it.
$(STAMP): pyproject.toml constraints.txt requirements-ocr.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[teacher,evaluate,s3,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-ocr.txt
	touch $@

.PHONY: setup
setup: $(STAMP)  ## create .venv and install everything

.PHONY: demo
demo: $(STAMP)  ## generate data, precompute, train, sample, measure: minutes on a CPU
	$(BIN)/python pipeline.py demo --out $(DEMO_DIR) $(DEMO_FLAGS)

# The report's tests drive a real browser. Who may not install one sees them skipped, by name; CI requires them.
.PHONY: browser
browser:
	@command -v chromedriver >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; \
	} || echo "chromium and chromium-driver are not installed: the browser tests will be skipped"

.PHONY: test
test: $(STAMP) browser  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

.PHONY: check
check: $(STAMP)  ## format, lint, types, import rules, hooks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pre-commit validate-config

.PHONY: format
format: $(STAMP)  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: $(STAMP)  ## the benchmarks: tables of ratios measured side by side
	for script in bench/bench_*.py; do $(BIN)/python $$script || exit 1; done

.PHONY: torture
torture: $(STAMP)  ## kill writers, fail disks and flip bits for a few minutes
	$(BIN)/python -m tests.torture $(TORTURE_FLAGS)

.PHONY: smoke-sd15
smoke-sd15: $(STAMP)  ## the ordinary commands on a full-size, rule-made checkpoint (24 GB of memory)
	$(BIN)/python -m tests.smoke_sd15

.PHONY: clean
clean:  ## remove the demo's files and caches (keeps .venv)
	rm -rf $(DEMO_DIR) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
