# Each target alone does all the set-up: a virtual environment in .venv, filled from requirements.lock.
#   make demo     the whole pipeline on rendered rooms, in minutes
#   make test     the tests                  make check    lint, format, types, import contracts
#   make proof    the long tests             make bench    the benchmarks
#   make lock     requirements.lock anew from pyproject.toml

WANTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(WANTED)' 2> /dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.synced
UV = $$(command -v uv || echo $(BIN)/uv)

export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test check proof bench lock
.DEFAULT_GOAL := demo

setup: $(STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 on the PATH: install one, or say make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv

# install, not sync: a sync would remove uv from .venv; compiled here once, since a worker that may not write bytecode
# (PYTHONDONTWRITEBYTECODE, a read-only image) would compile torch and all else at each of its starts
$(STAMP): requirements.lock pyproject.toml | $(BIN)/python
	@command -v uv > /dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/perceptio demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not proof and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proof: $(STAMP)
	$(BIN)/python -m pytest -m proof --proofs-to docs/proof

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks --to docs/bench

lock: $(BIN)/python
	@command -v uv > /dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --extra dev \
	  --python-version 3.11 -o requirements.lock pyproject.toml
