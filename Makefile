# Each target works on a fresh clone with nothing but python3 (3.11 or newer) and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVE_ARGS ?=
TEST_ARGS ?=
QUICK ?=
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help serve test check format bench install install-dev lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

serve: $(VENV)/installed ## Run chatterd on http://127.0.0.1:8000 (SERVE_ARGS="--port 9000")
	@exec $(BIN)/chatterd serve $(SERVE_ARGS)

test: $(VENV)/installed-dev ## Run the tests (TEST_ARGS="-k media")
	@exec $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(TEST_ARGS)

check: $(VENV)/installed-dev ## Lint, formatting, types, and whether models and migrations agree
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m tests.check_migrations

format: $(VENV)/installed-dev ## Format the code and mend what the linter can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/installed-bench ## Measure the speed, in 18 minutes (QUICK=1: in 3; BENCH_ARGS="--only POST")
	@exec $(BIN)/python -m bench $(if $(QUICK),--quick) $(BENCH_ARGS)

install: $(VENV)/installed ## Only make .venv, with what the server needs

install-dev: $(VENV)/installed-dev ## Only make .venv, with what tests and checks need as well

lock: $(VENV)/installed-dev ## Resolve the dependencies anew (needs the uv command)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --quiet --upgrade \
		--group build pyproject.toml --output-file requirements.txt
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --quiet --upgrade \
		--group build --group dev --constraint requirements.txt pyproject.toml --output-file requirements-dev.txt
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --quiet --upgrade \
		--group build --group dev --group bench --constraint requirements-dev.txt pyproject.toml --output-file requirements-bench.txt

clean: ## Remove .venv and caches; the data in var/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

# Debian splits venv out of python3: say so, rather than let ensurepip's traceback say it.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "chatterd needs Python 3.11 or newer: install python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "chatterd needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "Python's venv module is missing. On Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt pyproject.toml | $(BIN)/python
	$(call pip-install,requirements.txt)
	@touch $@

# The development set holds the whole runtime set in the same versions.
$(VENV)/installed-dev: requirements-dev.txt requirements.txt pyproject.toml | $(BIN)/python
	$(call pip-install,requirements-dev.txt)
	@touch $@ $(VENV)/installed

# And the bench's set holds that of the development.
$(VENV)/installed-bench: requirements-bench.txt requirements-dev.txt requirements.txt pyproject.toml | $(BIN)/python
	$(call pip-install,requirements-bench.txt)
	@touch $@ $(VENV)/installed-dev $(VENV)/installed

define pip-install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r $(1)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
endef
