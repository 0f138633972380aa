.DEFAULT_GOAL := help
.PHONY: help install format lint types test test-slow isolation check ci quickstart bench

help: ## Print what every target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

install: ## Make the environment that every other target uses
	uv sync --all-packages

format: ## Format the code and mend what lint can mend
	uv run ruff format
	uv run ruff check --fix

lint: ## Check format and lint
	uv run ruff format --check
	uv run ruff check

types: ## Check types, strictly
	uv run mypy

test: ## Run every package's tests and the cross-package ones
	uv run pytest

test-slow: ## Run the long suites too: fuzzing, crash images, soaks
	uv run pytest --run-slow

isolation: ## Build all packages; test each wheel alone with only what it declares
	.ci/isolation

check: lint types test ## What to run before a commit

ci: ## The whole gate
	.ci/run

quickstart: ## Train a tiny model on the standard library's source, about two minutes on 2 cores
	uv run apps/train.py --config configs/quickstart.json
