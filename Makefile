# Each target works as the first command in a fresh clone. Everything runs in .venv, built once from constraints.txt.

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest -q

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed ## train an agent on the CPU and show what it learned (runs/demo)
	@.venv/bin/agile demo

test: lint ## lint, types and unit tests
	@$(PYTEST) -n 2

test-slow: .venv/.installed ## the tests that `make test` leaves out
	@$(PYTEST) -m slow

lint: .venv/.installed ## ruff and mypy
	@$(PYTHON) -m ruff check --quiet
	@$(PYTHON) -m ruff format --check --quiet || { echo "Run: .venv/bin/ruff format"; exit 1; }
	@$(PYTHON) -m mypy

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `.unfinished` marks a build that was interrupted: pip may have left half a package, so the next one starts afresh.
# Debian's Python may lack ensurepip, hence the way round it through the Python's own pip. Without --no-compile, half of
# the time would go into bytecode of modules that nothing imports.
.venv/.installed: setup.py constraints.txt
	@set -e; \
	if [ -e .venv/.unfinished ] || ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	    for python in python3.11 python3 none; do \
	        if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then break; fi; \
	    done; \
	    if [ $$python = none ]; then \
	        echo "AGILE needs Python 3.11 or newer as python3.11 or python3; here: `python3 --version 2>&1`." >&2; exit 1; \
	    fi; \
	    echo "Making .venv with `$$python --version`"; \
	    $$python -m venv --clear .venv >/dev/null 2>&1 || { \
	        $$python -m venv --clear --without-pip .venv; \
	        $$python -m pip --python $(PYTHON) install --quiet pip; \
	    }; \
	fi; \
	rm -f $@; touch .venv/.unfinished; \
	echo "Installing into .venv (once; about 500 MB to download, a few minutes) ..."; \
	$(PYTHON) -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"; \
	mv .venv/.unfinished $@
