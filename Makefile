# What contributors run; CONTRIBUTING.md explains it. All targets use the active environment.
PYTHON ?= python
export OMP_NUM_THREADS ?= 1

.PHONY: help check test lint format docs pictures

help: ## list the targets
	@grep -E '^[a-z]+: ##' Makefile | sed 's/: ## /\t/' | expand -t 12

check: ## everything a change must pass: the list of .ci/run, in this environment
	bash .ci/check

test: ## the quick tests, in about a minute and a half
	$(PYTHON) -m pytest -n 2 -q -m "not slow and not model and not fuzz"

lint: ## ruff, mypy and the import contracts
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format: ## sort the imports and format all files
	ruff check --select I --fix .
	ruff format .

docs: ## rewrite the generated pages and config.toml
	$(PYTHON) -m tools.docs --write
	$(PYTHON) -m streamchat config --default > config.toml.new
	mv config.toml.new config.toml

pictures: ## redraw the pictures that the tests compare; look at the difference
	UPDATE_SNAPSHOTS=1 $(PYTHON) -m pytest -q tests/tui/test_tui_snapshots.py
