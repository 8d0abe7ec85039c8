# Every target sets the machine up first; once that is done, the stamp makes it cost nothing.
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint bench
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.retool-setup
# The oldest supported Python comes first: it is the one that the pins were resolved and tested with.
PYTHONS := python3.11 python3.12 python3.13 python3
ARGS ?=

help:
	@echo "make setup        build $(VENV) with the pinned packages"
	@echo "make quickstart   the whole job on this machine's CPU, with a report   (ARGS='--seed 1' …)"
	@echo "make test         the tests                                            (ARGS='-k sandbox' …)"
	@echo "make lint         ruff and mypy"
	@echo "make bench        the measurements of speed in benchmarks/"

setup: $(STAMP)

# A candidate is asked for its version: on some machines a name on PATH is only a launcher without a Python behind it.
# torch goes in first, by its pin alone, so that no other package's wishes can choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	@python=; for candidate in $(PYTHONS); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "make setup: no Python 3.11 or newer with venv on PATH; install one (Debian, Ubuntu: python3.11-venv)" >&2; \
	  exit 1; fi; \
	echo "Setting up $(VENV) with $$("$$python" --version): a few minutes, once"; \
	"$$python" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: setup
	@$(BIN)/retool quickstart $(ARGS)

test: setup
	@$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup
	@for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || { echo "make bench: there is no benchmark in benchmarks/" >&2; exit 1; }; \
	  echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done
