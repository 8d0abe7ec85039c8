# Every target sets the machine up first; once that is done, the stamp makes it cost nothing.
.DEFAULT_GOAL := help
.PHONY: help setup setup-verl quickstart test test-verl lint bench
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
VENV_VERL := .venv-verl
BIN := $(VENV)/bin
STAMP := .retool-setup
# The oldest supported Python comes first: it is the one that the pins were resolved and tested with.
PYTHONS := python3.11 python3.12 python3.13 python3
ARGS ?=

help:
	@echo "make setup        build $(VENV) with the pinned packages"
	@echo "make quickstart   the whole job on this machine's CPU, with a report   (ARGS='--seed 1' …)"
	@echo "make test         the tests                                            (ARGS='-k sandbox' …)"
	@echo "make test-verl    the cluster engine's, with the real verl on this CPU     (an environment of its own)"
	@echo "make lint         ruff and mypy"
	@echo "make bench        the measurements of speed in benchmarks/"

setup: $(VENV)/$(STAMP)
setup-verl: $(VENV_VERL)/$(STAMP)
$(VENV)/$(STAMP): EXTRAS := dev
$(VENV)/$(STAMP): CONSTRAINTS := constraints.txt
$(VENV_VERL)/$(STAMP): EXTRAS := test,verl
$(VENV_VERL)/$(STAMP): CONSTRAINTS := constraints-verl.txt

# A candidate is asked for its version: on some machines a name on PATH is only a launcher without a Python behind it.
# torch goes in first, by its pin alone, so that no other package's wishes can choose another build of it.
$(VENV)/$(STAMP) $(VENV_VERL)/$(STAMP): pyproject.toml constraints.txt constraints-verl.txt
	@python=; for candidate in $(PYTHONS); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.11 or newer with venv on PATH; install one (Debian, Ubuntu: python3.11-venv)" >&2; \
	  exit 1; fi; \
	echo "Setting up $(@D) with $$("$$python" --version): a few minutes, once"; \
	"$$python" -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

quickstart: setup
	@$(BIN)/retool quickstart $(ARGS)

test: setup
	@$(BIN)/python -m pytest $(ARGS)

test-verl: setup-verl
	@$(VENV_VERL)/bin/python -m pytest tests/verl $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup
	@for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || { echo "make bench: there is no benchmark in benchmarks/" >&2; exit 1; }; \
	  echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done
