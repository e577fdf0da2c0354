# Everything here works from a fresh checkout with Python 3.11, pip and make.

PYTHON ?= python3
ENGINE ?=
ARGS ?=
export ENGINE

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo run test lint format docs bench-jobs bench-openai bench-relay lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Make .venv with everything in it (ENGINE=cuda|cpu|none, PYTHON=python3)
	@$(PYTHON) scripts/setup.py

demo: setup  ## Start a queen, a hive and a worker with a real model, and talk to it
	@$(BIN)/python scripts/demo.py $(ARGS)

run: setup  ## Start rbee on this machine
	@$(BIN)/rbee up $(ARGS)

test: setup  ## Run all tests, those with a real engine too (ARGS="-k name")
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup  ## Rewrite the code in the one style
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

docs: setup  ## Build the documentation into site/, with every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench-jobs: setup  ## Measure what a job costs, and write it into docs/benchmarks.md (two minutes)
	@$(BIN)/python -m benchmarks.jobs $(ARGS)

bench-openai: setup  ## Measure the OpenAI routes, beside litellm and sglang-router, and before real vLLM (thirteen minutes)
	@$(BIN)/python -m benchmarks.openai_proxies $(ARGS)
	@$(BIN)/python -m benchmarks.openai_vllm $(ARGS)

bench-relay: setup  ## Measure what a hop costs, beside sglang-router and nginx (six minutes)
	@$(BIN)/python -m benchmarks.relay $(ARGS)

lock:  ## Resolve the lists in requirements/ anew
	@PYTHONDONTWRITEBYTECODE=1 $(PYTHON) scripts/lock.py

clean:  ## Remove everything that these commands made
	rm -rf .venv .tools .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov site dist build
	find . -name node_modules -prune -o -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
