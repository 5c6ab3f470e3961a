# make demo   train the demonstration's three arms, print the table, draw the picture
# make test   lint, type check and test
# make test-all   the same, and then what takes long, with a log of that in tests/test-all.log
# Each makes its own environment in .venv, and needs Python 3.11 or newer.

SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all clean

demo: $(VENV)/ready
	$(BIN)/python -m benchmarks.grokking.demo

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

test-all: test
	set -o pipefail; $(BIN)/pytest -m long -v -s --no-header --color no --disable-warnings | tee tests/test-all.log

# torch comes first and exactly, so that nothing else chooses its build. Release 0.1.2 lies in a folder of its own,
# since it has our name: the tests run it in its own process.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable '.[test]'
	$(PIP) --no-deps --upgrade --target $(VENV)/published grokadamw==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
