# Two commands: `make demo` runs the main job on the made-up cohort, `make test` passes the tests.
# Each sets up what it needs in .venv, once; afterwards neither needs a network.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check faults docs build clean
.DELETE_ON_ERROR:

demo: $(VENV)/.run-installed
	$(BIN)/pipeline demo demo

test: $(VENV)/.test-installed check
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

faults: $(VENV)/.test-installed
	FAULTS=long $(BIN)/python -m pytest tests/faults --timeout 0

docs: $(VENV)/.test-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.run-installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "No virtual environment could be made: on Debian run  apt-get install python3.11-venv" >&2; exit 1; }
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.test-installed: $(VENV)/.run-installed
	$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

build: $(VENV)/.run-installed
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) demo dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
