# Each target does its own set-up in .venv, works a second time, and needs no network
# once the set-up has run. `make PYTHON=python3.12 test` chooses the interpreter;
# `make EXTRAS=test,gpu demo` adds extras of setup.py.

PYTHON ?= python3
EXTRAS ?= test
WORKERS ?= 2
LONG_BENCHES := reward_hacking latent_emoji
COMMANDS := $(basename $(notdir $(shell grep -l __main__ benchmarks/*.py)))
BENCH ?= $(filter-out $(LONG_BENCHES),$(COMMANDS))
VENV := .venv
BIN := $(VENV)/bin
# What is installed says the name of a stamp, .installed-test+gpu. One that has all the
# extras asked for will do: without a network nothing could be installed again.
comma := ,
STAMPS := $(wildcard $(VENV)/.installed-*)
extras = $(subst +, ,$(1:$(VENV)/.installed-%=%))
lacking = $(filter-out $(call extras,$(1)),$(subst $(comma), ,$(EXTRAS)))
FITTING := $(foreach stamp,$(STAMPS),$(if $(call lacking,$(stamp)),,$(stamp)))
NEW := $(VENV)/.installed-$(subst $(comma),+,$(EXTRAS))
STAMP := $(firstword $(FITTING) $(NEW))
empty :=
INSTALL = $(subst $(empty) $(empty),$(comma),$(strip $(call extras,$@)))
# An interpreter that was asked for by name is the one that is used: another one's
# environment is made anew.
ifneq ($(origin PYTHON),file)
VERSION := $(shell $(PYTHON) --version 2>&1)
ifneq ($(wildcard $(BIN)/python),)
ifneq ($(VERSION),$(shell $(BIN)/python --version 2>&1))
.PHONY: $(STAMP)
CLEAR := --clear
endif
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       DDRL on the emoji model: at most ten minutes on two cores"
	@echo "make test       lint, types and every test"
	@echo "make test-fast  the same without the tests marked slow"
	@echo "make lint       ruff and pyright only"
	@echo "make format     let ruff rewrite the files"
	@echo "make bench      the measurements of benchmarks/, one table each"
	@echo "make clean      remove caches and build folders (keeps .venv and runs/)"

# The stamp is written last: an interrupted installation starts again.
$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "got:     $$($(PYTHON) --version 2>&1)"; \
	  echo "wanted:  Python 3.11 or later"; \
	  echo "way out: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[$(INSTALL)]"
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m ddrl_jax.main \
	  --config=configs/quickstart.py --workdir=runs/quickstart

# pyright-python asks the registry for a newer release unless it is told not to.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One file is one worker's: tests of a file share what they compile. tests/conftest.py
# orders the files.
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python -m pytest -q $(SPREAD)

test-fast: lint
	$(BIN)/python -m pytest -q $(SPREAD) -m "not slow"

# The rest of benchmarks/ are parts of these or, like reward_hacking, take hours:
# `make bench BENCH=reward_hacking`.
bench: $(STAMP)
	@for name in $(BENCH); do \
	  echo "== benchmarks/$$name.py"; $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:
	rm -rf build dist *.egg-info .jax_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune \
	  -exec rm -rf {} +
