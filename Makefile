# `make demo` and `make test` do their own set-up; later runs go straight to work.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   ?= demo

.PHONY: help demo test test-slow test-gpu lint check lock clean
help:
	@echo "make demo       the whole road on a small drawn world: ends with $(DEMO)/report.html"
	@echo "make test       the test suite"
	@echo "make test-slow  the exhaustive tests"
	@echo "make test-gpu   those that need a GPU; BEIT3_DEVICE=cpu rehearses them without one"
	@echo "make lint       ruff and pyright"
	@echo "make lock       renew the lock files of infra/ from pyproject.toml"
	@echo "make clean      remove the demo's folder (the environment stays)"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet "torch==2.13.0" numpy
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python pipelines/demo.py --root $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

lock: $(STAMP)
	$(BIN)/python -m pip install --quiet "uv==0.13.9"
	PATH="$(abspath $(BIN)):$$PATH" infra/lock.sh

clean:
	rm -rf $(DEMO)
