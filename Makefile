.DEFAULT_GOAL := help
.PHONY: help install format lint types test test-fast test-slow test-slow-ckpt test-slow-data verify-resume isolation \
	api check-resolutions docs-check \
	check ci quickstart bench bench-powercut bench-scaling eval-parity

help: ## Print what every target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-17s %s\n", $$1, $$2}'

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

FAST = packages/matilda-model packages/matilda-train \
	$(addprefix packages/matilda-optim/tests/test_optim_,step.py state.py groups.py) \
	$(addprefix packages/matilda-data/tests/test_data_,golden.py stream.py) \
	$(addprefix packages/matilda-ckpt/tests/test_ckpt_,roundtrip.py hostile.py other_format.py) \
	$(addprefix tests/test_,packaging.py help.py docs.py launchers.py bad_input.py) \
	tests/test_resume_is_bitwise.py tests/test_guards.py

test-fast: ## Run the tests that say most in the shortest time
	uv run pytest $(FAST)

test-slow: ## Run the long suites too: fuzzing, crash images, soaks
	uv run pytest --run-slow

test-slow-ckpt: ## matilda-ckpt's crash model, system-call sweep, fuzzing and resharding, whole
	MATILDA_SLOW=1 uv run pytest packages/matilda-ckpt -o timeout=0

test-slow-data: ## matilda-data's kills, hub faults and bit flips, whole
	MATILDA_SLOW=1 uv run pytest packages/matilda-data -o timeout=0

verify-resume: ## 500 kills of a small run, compared bit for bit with its twin
	rm -rf runs/verify-resume
	uv run apps/verify_resume.py --config configs/verify_resume.json --kills 500 \
		--run-dir runs/verify-resume

bench: ## The benchmarks that need no GPU, root or network, in their quick form
	for program in ckpt data muon muon_vs_adamw scaling step time_to_loss; do uv run benchmarks/$$program.py --quick || exit 1; done

eval-parity: ## Our likelihoods beside lm-evaluation-harness' own, on every item (TASK_DIR=data/evals)
	uv run --extra eval --with accelerate pytest -n 0 \
		packages/matilda-train/tests/test_evals_harness.py
	uv run --extra eval --with accelerate benchmarks/eval_parity.py \
		--task-dir $(or $(TASK_DIR),data/evals) --write docs/RESULTS.md

bench-powercut: ## Crash images of a simulated power cut, beside peers (needs root, FUSE and loop)
	uv run benchmarks/ckpt_powercut.py --quick

bench-scaling: ## One node's GPUs by number and strategy, elastic resume, a killed rank (needs CUDA)
	uv run benchmarks/scaling.py --data-dir data/corpus --work-dir runs/scaling

api: ## List the public names of every package anew, in docs/api
	uv run python .ci/public_api.py --write

isolation: ## Build all packages; test each wheel alone with only what it declares
	.ci/isolation

check-resolutions: ## Each package alone with the lowest and the highest versions it declares
	RESOLUTION=lowest-direct .ci/isolation
	RESOLUTION=highest .ci/isolation

docs-check: ## Type in every code block of the Markdown files that needs no GPU and no network
	uv run pytest tests/test_docs.py --run-slow -n 2

check: lint types test-fast ## What to run before a commit, under three minutes

ci: ## The whole gate
	.ci/run

quickstart: ## Train a tiny model on the standard library's source, about two minutes on 2 cores
	uv run apps/train.py --config configs/quickstart.json
