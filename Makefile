# What can be done with a checkout. `make help` lists it.
.DEFAULT_GOAL := help
SHELL         := /bin/bash
PYTHON        ?= python3
VENV          := .venv
BIN           := $(VENV)/bin
INSTALLED     := $(VENV)/.installed
PYTEST        := $(BIN)/python -m pytest

.PHONY: help setup provision lint types programs test-unit test-model test-e2e test-faults test-kernel test test-all faults \
        endurance fuzz demo bench bench-docs clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: provision $(INSTALLED) ## install all that is needed: packages (as root), and the project into .venv

provision:
	@vagrant/provision.sh

$(INSTALLED): pyproject.toml | provision
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

lint: $(INSTALLED) ## check style: ruff
	$(BIN)/ruff check . tests/lab/lab tests/demo/demo

types: $(INSTALLED) ## check types: mypy, strict, tests too
	$(BIN)/mypy
	MYPYPATH=tests $(BIN)/mypy --explicit-package-bases tests

programs: provision ## build the programs that tests move
	$(MAKE) --no-print-directory -C tests/programs

test-unit: setup programs ## test the parts, quick
	$(PYTEST) tests/unit

test-model: setup ## explore all that can come of a commit
	$(PYTEST) tests/model

test-e2e: setup programs ## test the whole in a lab of hosts (as root)
	$(PYTEST) tests/e2e

test-faults: setup programs ## test what is left when agents, links and calls fail in moves (as root)
	$(PYTEST) tests/faults

test-kernel: setup programs ## test on Debian 12's own kernel, in an emulated machine
	$(PYTEST) tests/kernel

test: setup lint types programs test-model test-unit test-e2e test-faults ## everything that every change must pass

test-all: export MIGRATE_TEST_FULL = 1
test-all: RUNS ?= 1000
test-all: test test-kernel faults endurance ## the same with every test at full length, and on the older kernel

# make faults RUNS=1000 SEED=1, ONLY="Commit/*", MATRIX=1 (all cases that there are, which takes hours)
faults: setup programs ## move a process to and fro, with a fault in each move (as root)
	PYTHONPATH=tests $(BIN)/python -m faults $(if $(RUNS),--runs $(RUNS)) $(if $(SEED),--seed $(SEED)) \
	    $(if $(MATRIX),--matrix) $(foreach name,$(ONLY),--only '$(name)')

# make endurance MOVES=200 SEED=1 JSON=1, PUBLISH=1: into docs/, too
endurance: setup programs ## move a process 200 times, each second time with a failure: does anything grow? (as root)
	PYTHONPATH=tests $(BIN)/python -m endurance --command "make endurance $(strip $(MAKEOVERRIDES))" \
	    $(if $(MOVES),--moves $(MOVES)) $(if $(SEED),--seed $(SEED)) $(if $(JSON),--json) \
	    $(if $(PUBLISH),--publish)

# make fuzz MINUTES=5 ONLY="stream message": what it finds, and the inputs that lead on, stay in build/fuzz
fuzz: setup ## feed every decoder hostile input, 30 minutes in all: executions, crashes, peak allocation of each
	PYTHONPATH=tests nice $(BIN)/python -m fuzz.campaign --minutes $(or $(MINUTES),30) $(foreach name,$(ONLY),--only $(name))

demo: setup programs ## move a real redis-server under load between two hosts, and show the report
	tests/demo/demo

# make bench QUICK=1, ONLY="threads memory/*", REPEAT=3, PUBLISH=1: into docs/, too
bench: setup programs ## measure moves (as root): tables, pictures and build/bench/bench.json; QUICK=1 for some of it
	PYTHONPATH=tests $(BIN)/python -m bench --command "make bench $(strip $(MAKEOVERRIDES))" $(if $(QUICK),--quick) \
	    $(foreach name,$(ONLY),--only '$(name)') $(if $(REPEAT),--repeat $(REPEAT)) $(if $(PUBLISH),--publish)

bench-docs: $(INSTALLED) ## put the figures of docs/bench/lab.json into docs/performance.md
	PYTHONPATH=tests $(BIN)/python -m bench.docs

clean: ## remove all that was made here
	$(MAKE) --no-print-directory -C tests/programs clean
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
