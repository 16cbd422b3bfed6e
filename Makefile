# Needs python3 >= 3.11, make and git. Everything else is set up once, in .venv, from pyproject.toml and uv.lock.
# `make UV=/path/to/uv ...` uses that uv; otherwise one on PATH, or one that is fetched into .uv.

SHELL := /bin/sh
BIN := .venv/bin
READY := .venv/.ready
PYTHON3 ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test docs fuzz kills lint format bench bench-gpu clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## set up .venv (the other targets do it by themselves, once)

$(READY): pyproject.toml uv.lock
	@UV="$(UV)" PYTHON3="$(PYTHON3)" sh scripts/setup.sh
	@touch $@

demo: $(READY)  ## photographs and nuclei, dense against sparse: pictures in out/demo, tables, one JSON line
	@$(BIN)/sievit demo --out out/demo $(ARGS)

test: lint  ## lint, types and tests
	$(BIN)/pytest -n auto --dist worksteal $(ARGS)

docs: $(READY)  ## the documentation as a site, from docs/ and the docstrings: open out/site/index.html
	@$(BIN)/python scripts/docs.py

MINUTES ?= 20
SEED ?= 0

fuzz: $(READY)  ## hostile files and options for MINUTES=20, from SEED=0: what fails is kept in out/fuzz
	$(BIN)/python tests/hostile/fuzz.py --minutes $(MINUTES) --seed $(SEED) $(ARGS)

kills: $(READY)  ## kill a training, one of two processes, and a predict 20 times each; compare with whole ones
	$(BIN)/python tests/hostile/kills.py --seed $(SEED) $(ARGS)

lint: $(READY)  ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check --error-on-warning

format: $(READY)  ## put the code into its format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: $(READY)  ## time blocks, backbone, network and a detector's parts, dense against sparse: some minutes, out/bench
	@$(BIN)/sievit bench blocks --batches 1 --repeats 5 --out out/bench $(ARGS)
	@$(BIN)/sievit bench backbone --sizes 512 512 --batches 1 --repeats 5 --out out/bench $(ARGS)
	@$(BIN)/sievit bench network --sizes 512 512 --batches 1 --repeats 5 --out out/bench $(ARGS)
	@$(BIN)/sievit bench heads --repeats 3 --out out/bench $(ARGS)

ON_GPU = --device cuda --precision bfloat16 --batches $(BATCHES_GPU) --repeats 15 --out out/bench-gpu
EVERY_MODE := dense dense_compiled dense_graphs dynamic bucketed bucketed_graphs static static_compiled static_graphs
BATCHES_GPU := 1 4 8 32
SIZES_GPU := 512 512 800 1216 1024 1024

bench-gpu: $(READY)  ## the tests that need a GPU, then all benches there, in bfloat16 and every mode: out/bench-gpu; fails if any did
	@failed=0; bench() { $(BIN)/sievit bench "$$@" $(ON_GPU) $(ARGS) || failed=1; }; \
	$(BIN)/pytest -m gpu || failed=1; \
	bench blocks --models vit_s vit_b --sizes $(SIZES_GPU) --modes $(EVERY_MODE); \
	bench backbone --models vit_s --sizes $(SIZES_GPU) --modes $(EVERY_MODE); \
	bench network --models vit_b vit_l --modes $(EVERY_MODE); \
	bench heads --sizes $(SIZES_GPU); \
	exit $$failed

clean:  ## remove what was produced; the environment stays
	rm -rf out dist .cache .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove the environment too
	rm -rf .venv .uv
