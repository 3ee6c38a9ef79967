# Every target but help and clean makes the environment first; that costs nothing when nothing changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-stack check bench fuzz clean

BIN := .venv/bin
PYTEST_ARGS ?=
# What needs more than this machine's own kernel, Python and Ray, or minutes: see the markers in pyproject.toml.
STACK := long or netns or collector or loki or vllm

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup:  ## make .venv (quick when nothing changed)
	@scripts/setup

demo: setup  ## a small RL-shaped Ray job under `skyrl-otel run`
	@$(BIN)/skyrl-otel run -- $(BIN)/python examples/rl_job.py

check: setup  ## format, lint, types, direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Four at once on two cores: most of what the tests do is wait for processes. One file is one worker's, for its cluster.
test: check  ## check, then all tests that need only this machine; PYTEST_ARGS="-k spool" for some
	$(BIN)/pytest -n 4 --dist loadfile -m "not ($(STACK))" $(PYTEST_ARGS)

test-stack: setup  ## tests on namespaces and real collectors; PYTEST_ARGS as above
	@scripts/test-stack -m "$(STACK)" $(PYTEST_ARGS)

bench: setup  ## all benchmarks, as a table
	$(BIN)/python -m benchmarks all

fuzz: setup  ## the property tests, with many more examples, on all cores
	$(BIN)/pytest -v -n $$(nproc) --dist worksteal -m "hypothesis and not ($(STACK))" --hypothesis-profile=fuzz --timeout=1800 $(PYTEST_ARGS)

clean:  ## remove .venv, caches and build products
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
