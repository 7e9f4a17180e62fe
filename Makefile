# `make` lists the targets. Everything runs in .venv, which `make setup` creates with pip; an active environment is not touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# A release inside the range that pyproject.toml allows; make TORCH='torch>=2.11,<2.14' takes the newest instead
TORCH ?= torch==2.13.0

.PHONY: help setup train test lint format docs docs-serve dist clean

help:
	@echo "make setup               create $(VENV) with everything that training and testing need"
	@echo "make train ARGS='...'    train PPO on CartPole-v1, or on what ARGS say (--env-id Acrobot-v1)"
	@echo "make test                style, types and all tests"
	@echo "make lint / make format  check style and types / apply the style"
	@echo "make docs / docs-serve   build the documentation into site/, strictly / show it at http://127.0.0.1:8000"
	@echo "make dist                build the package into dist/, as a wheel and as source"
	@echo "make clean               remove $(VENV) and caches"

setup: $(VENV)/.done

# Installed once, and again when the dependencies change
$(VENV)/.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| (echo "Python 3.11, 3.12 or 3.13 is needed; say which with make PYTHON=python3.12" >&2; exit 1)
	@echo "1/4 a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2/4 pip 25.1 or newer"
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@echo "3/4 PyTorch: $(TORCH) (some minutes; with CUDA, as pip takes it on Linux, some gigabytes)"
	@$(BIN)/python -m pip install --quiet '$(TORCH)'
	@echo "4/4 everything else that training and testing need (a minute or two)"
	@$(BIN)/python -m pip install --quiet --editable . --group dev
	@echo "ready; to use it from the shell: source $(VENV)/bin/activate"
	@touch $@

train: setup
	$(BIN)/python fabricrl/algos/ppo/ppo.py --env-id CartPole-v1 $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.docs: $(VENV)/.done
	@$(BIN)/python -m pip install --quiet --group docs
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py --check
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve

dist: $(VENV)/.done
	$(BIN)/python docs/generate.py --check
	@$(BIN)/python -m pip install --quiet build
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf site dist $(VENV) .pytest_cache .mypy_cache .ruff_cache
