# Every target does the set-up it needs; a second call takes no set-up time.
# On a machine that has only Python 3.11+ and make, `make demo` and `make test` are all there is to type.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
UV     := $(BIN)/uv
UV_VERSION := 0.13.8
# Locked for the oldest Python that we support; every newer one resolves from the same file.
LOCK := pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
        --extra openmm --group dev pyproject.toml --output-file requirements.lock

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench slow learn lock clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(READY)  ## virtual environment, locked packages, this project (editable)

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ssl-bench needs Python 3.11 or newer; '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Say which to use: make setup PYTHON=python3.13" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "The venv module is missing. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(READY): requirements.lock pyproject.toml | $(UV)
	$(UV) pip sync --python $(BIN)/python --require-hashes --compile-bytecode requirements.lock
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation --compile-bytecode --editable .
	@touch $(READY)

demo: $(READY)  ## the whole chain on built-in data
	@$(BIN)/ssl-bench demo

test: $(READY)  ## the test suite
	@$(BIN)/python -m pytest

check: $(READY)  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: $(READY)  ## speed, as ratios measured in one run
	@for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

slow: $(READY)  ## every dense row at full size with ViT-B/16: an hour, up to 20 GB
	@$(BIN)/python -m pytest -m slow -s

learn: $(READY)  ## does every method learn? all of them on the toy world, three seeds; goes on where it stopped
	@$(BIN)/python tests/benchmarks/learn.py
	@$(BIN)/python tests/benchmarks/learn.py --ablations

lock: | $(UV)  ## resolve requirements.lock anew
	$(UV) $(LOCK)

clean:  ## remove the virtual environment
	rm -rf $(VENV)
