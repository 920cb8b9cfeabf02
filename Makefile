# Two commands matter: `make demo` runs the main job, `make test` proves it.
# Both set up their own virtual environment in .venv first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
COMPILED := build/compiled
ON_COMPILED = PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(COMPILED) $(BIN)/pytest -o pythonpath="$(COMPILED) ."
.DEFAULT_GOAL := help

.PHONY: help demo test lint types unit e2e compiled coverage bench format docs site wheel clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The environment is rebuilt when a dependency or a .proto file changes.
$(VENV)/ready: pyproject.toml constraints.txt hatch_build.py $(wildcard protos/flowcontrol/v1/*.proto)
	@PYTHON="$(PYTHON)" sh ./setup.sh $(VENV)
	@touch $@

demo: $(VENV)/ready  ## The main job on a real Envoy: with and without flow control, then a picture
	@$(BIN)/flowcontrol demo $(ARGS)

test: lint types unit  ## Everything CI checks: lint, types, layers, docs, unit to real-Envoy tests

lint: $(VENV)/ready  ## Style, import layers, docstrings, generated documentation
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/lint-imports --no-cache
	$(BIN)/interrogate --quiet flowcontrol server

types: $(VENV)/ready  ## mypy --strict
	$(BIN)/mypy
	$(BIN)/mypy --strict tests --exclude tests/benchmarks

# Those on a real Envoy measure waits, so they run one after the other, with the machine to themselves.
unit: $(VENV)/ready  ## All tests, end to end on a real Envoy included
	$(BIN)/pytest -m "not e2e" --numprocesses auto --dist loadfile $(ARGS)
	$(BIN)/pytest -m e2e $(ARGS)

coverage: $(VENV)/ready  ## Which lines of the engine no unit test runs
	$(BIN)/pytest -m "not e2e" --numprocesses auto --dist loadfile --cov --cov-report=term-missing:skip-covered

e2e: $(VENV)/ready  ## Only the tests on a real Envoy
	$(BIN)/pytest -m e2e $(ARGS)

# The wheel is unpacked beside the sources, which it would hide, and used only where a path says so.
$(COMPILED)/ready: $(VENV)/ready $(wildcard flowcontrol/*.py server/*.py server/*/*.py)
	@rm -rf build && FLOWCONTROL_COMPILE=1 $(BIN)/python -m build --wheel --no-isolation --outdir build . >/dev/null
	@$(BIN)/python -m pip install --quiet --no-deps --target $(COMPILED) build/*.whl
	@touch $@

compiled: $(COMPILED)/ready  ## Compile what is on the way of a request, and run all tests on that; needs gcc
	$(ON_COMPILED) -m "not e2e and not interpreted" --numprocesses auto --dist loadfile $(ARGS)
	$(ON_COMPILED) -m "e2e and not interpreted" $(ARGS)

# Each script says its question, method, caveats, and how to run it shorter. Half an hour in all.
bench: $(COMPILED)/ready  ## Benchmarks, results in tests/benchmarks/results/; needs wrk, g++ and libgrpc++-dev
	PYTHONPATH=. $(BIN)/python tests/benchmarks/through_envoy.py
	PYTHONPATH=. $(BIN)/python tests/benchmarks/saturated.py
	PYTHONPATH=. $(BIN)/python tests/benchmarks/streaming.py
	for way in . $(COMPILED); do \
	  PYTHONPATH=$$way $(BIN)/python tests/benchmarks/engine.py && PYTHONPATH=$$way $(BIN)/python tests/benchmarks/bridge.py || exit; \
	done
	$(BIN)/python tests/benchmarks/draw.py

docs: $(VENV)/ready  ## Rewrite what pages quote from the code
	$(BIN)/python -m tests.readme --write

site: $(VENV)/ready  ## Build the documentation into site/, every link checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/ready  ## Apply formatter and safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/ready  ## Build the wheel into dist/
	$(BIN)/python -m build --wheel .

clean:  ## Remove everything made here
	rm -rf $(VENV) dist build site flowcontrol/v1 demo-result .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
