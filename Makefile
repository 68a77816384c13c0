# Every target sets up what it needs in .venv; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
DEMO_DIR ?= demo
export PYTHONUNBUFFERED := 1

.PHONY: help
help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
INPUTS := pyproject.toml constraints.txt requirements-ocr.txt

# torch first and alone: the constraint picks one build, and nothing installed later can swap it.
$(STAMP): $(INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt '.[teacher,evaluate]'
	$(PIP) --no-deps -r requirements-ocr.txt
	touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) -c constraints.txt '.[teacher,evaluate,page,s3,dev]'
	touch $@

.PHONY: setup
setup: $(DEV_STAMP)  ## create .venv and install everything

.PHONY: demo
demo: $(STAMP)  ## generate data, precompute, train, sample, measure: minutes on a CPU
	$(BIN)/python pipeline.py demo --out $(DEMO_DIR) $(DEMO_FLAGS)

.PHONY: figures
figures: demo  ## run the demo, and put its picture and figures into README and docs
	$(BIN)/python bench/demo_figures.py --demo $(DEMO_DIR)

# The tests of the report and of the page drive a real browser, and kerned text needs fribidi. Who may not install them sees the browser's
# tests skipped, by name; CI requires them.
.PHONY: system
system:
	@{ command -v chromedriver && ldconfig -p | grep libfribidi; } >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver libfribidi0 >/dev/null; \
	} || echo "chromium, chromium-driver or libfribidi0 are not installed: the browser tests will be skipped"

.PHONY: test
test: $(DEV_STAMP) system  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

# A real Slurm of this machine alone. Who may not start one sees its tests skipped, by name; CI requires them.
.PHONY: slurm
slurm:
	@{ PATH=$$PATH:/usr/sbin command -v slurmctld && PATH=$$PATH:/usr/sbin command -v munged; } >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null; \
	} || echo "slurmctld, slurmd, slurm-client or munge are not installed: the tests on Slurm will be skipped"

.PHONY: test-slurm
test-slurm: $(DEV_STAMP) slurm  ## interrupt jobs of a real Slurm, and compare the results (root; two minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm --timeout 900 --durations=0 tests/slurm

.PHONY: check
check: $(DEV_STAMP)  ## format, lint, types, import rules: the pre-commit hooks on every file
	$(BIN)/pre-commit run --all-files

.PHONY: format
format: $(DEV_STAMP)  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: $(DEV_STAMP)  ## the benchmarks: tables of ratios measured side by side
	for script in $(filter-out bench/bench_gpu.py,$(wildcard bench/bench_*.py)); do $(BIN)/python $$script || exit 1; done

PARTS ?= quick
.PHONY: bench-gpu
bench-gpu: $(DEV_STAMP)  ## both stages at full size on a GPU, before and after: PARTS="quick" (4 minutes) or "all" (9)
	$(BIN)/python bench/bench_gpu.py $(PARTS)

.PHONY: torture
torture: $(DEV_STAMP)  ## kill writers, fail disks and flip bits for a few minutes
	$(BIN)/python -m tests.torture $(TORTURE_FLAGS)
	$(BIN)/python -m tests.stage1_teacher.torture

.PHONY: smoke-sd15
smoke-sd15: $(DEV_STAMP)  ## the ordinary commands on a full-size, rule-made checkpoint (24 GB of memory)
	$(BIN)/python -m tests.smoke_sd15

.PHONY: clean
clean:  ## remove the demo's files and caches (keeps .venv)
	rm -rf $(DEMO_DIR) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
