.DEFAULT_GOAL := help
.PHONY: help check test test-all smoke bench

help:  ## say what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

check:  ## lint, format and types
	uv run ruff check .
	uv run ruff format --check .
	uv run mypy

test:  ## the tests that take minutes
	uv run pytest

test-all: check  ## everything that CI runs
	uv run pytest
	uv run pytest -m slow

smoke:  ## two steps of training, validation and test on the embedded data
	uv run train.py debug=fast

bench:  ## measure the speed of a training step and of the evaluation
	uv run python -m benchmarks.train_step
