# Every target builds .venv first; a second run finds it ready. See `make help`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# 3.11 first: it is the version that constraints.txt is tested with.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	>/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= gateway,worker,planner,launcher,ucx-cu12,dev
TORCH := $(shell grep '^torch==' constraints.txt)
# On Linux the default index gives the CUDA build (several GB). For the CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
CODE := $(wildcard services shared examples bench)
FAST_TESTS := tests/unit tests/contract tests/architecture
# What may share the cores with other tests; the rest starts clusters that are timed, killed or filled.
SHARED_TESTS := $(FAST_TESTS) tests/component tests/equivalence tests/gpu
ALONE_TESTS := tests/integration tests/e2e tests/chaos
# As many processes as cores (at most 4: each holds models); JOBS=0 runs all in one.
JOBS ?= logical
IN_PARALLEL := -n $(JOBS) --maxprocesses 4 --dist loadfile
# Arguments for the command behind a target, e.g. make up ARGS="--decodes 2"
ARGS ?=

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' \
	| awk -F'\t' '{ printf "  make %-8s %s\n", $$1, $$2 }'
	@echo "  Variables: PYTHON= VENV= EXTRAS= TORCH_INDEX= JOBS= ARGS="

.PHONY: demo
demo: $(STAMP) ## Start every service on a small model, ask about a picture, stop
	$(BIN)/triptych demo $(ARGS)

.PHONY: up
up: $(STAMP) ## Start every service and serve on http://127.0.0.1:8000
	$(BIN)/triptych up $(ARGS)

.PHONY: test
test: $(STAMP) ## Run all tests
	$(BIN)/python -m pytest $(IN_PARALLEL) $(SHARED_TESTS) $(ARGS)
	$(BIN)/python -m pytest $(ALONE_TESTS) $(ARGS)

.PHONY: check
check: $(STAMP) ## Lint, format, types, import contracts, fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q $(IN_PARALLEL) $(FAST_TESTS)

.PHONY: format
format: $(STAMP) ## Format the code and apply safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(STAMP) ## Run the benchmarks
	$(BIN)/python -m bench $(ARGS)

.PHONY: install
install: $(STAMP) ## Build .venv and nothing more

.PHONY: clean
clean: ## Remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# torch goes first and alone: with it in place, no later step can choose another build.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "needs Python 3.11, 3.12 or 3.13 with venv; set PYTHON="; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -e '.[$(EXTRAS)]' -c constraints.txt
	touch $@
