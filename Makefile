# Needs python3 >= 3.11, make and git. Everything else is set up once, in .venv, from pyproject.toml and uv.lock.
# `make UV=/path/to/uv ...` uses that uv; otherwise one on PATH, or one that is fetched into .uv.

SHELL := /bin/sh
BIN := .venv/bin
READY := .venv/.ready
PYTHON3 ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench bench-gpu clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## set up .venv (the other targets do it by themselves, once)

$(READY): pyproject.toml uv.lock
	@UV="$(UV)" PYTHON3="$(PYTHON3)" sh scripts/setup.sh
	@touch $@

demo: $(READY)  ## find objects in fresh scenes, dense against sparse: pictures in out/demo, a table, one JSON line
	@$(BIN)/sievit demo --out out/demo $(ARGS)

test: lint  ## lint, types and tests
	$(BIN)/pytest $(ARGS)

lint: $(READY)  ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check --error-on-warning

format: $(READY)  ## put the code into its format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: $(READY)  ## time blocks and a whole segmenter, dense against sparse, on this machine
	@$(BIN)/sievit bench blocks $(ARGS)
	@$(BIN)/sievit bench network $(ARGS)

bench-gpu: $(READY)  ## the tests that need a GPU, then the times there
	$(BIN)/pytest -m gpu
	@$(BIN)/sievit bench blocks --device cuda $(ARGS)
	@$(BIN)/sievit bench network --device cuda $(ARGS)

clean:  ## remove what was produced; the environment stays
	rm -rf out dist .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove the environment too
	rm -rf .venv .uv
