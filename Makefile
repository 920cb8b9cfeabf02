# Two main commands: `make demo` shows the effect of flow control, `make test` runs all checks.
# Both first create a virtual environment in .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
COMPILED := build/compiled
ON_COMPILED = PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(COMPILED) $(BIN)/pytest -o pythonpath="$(COMPILED) ."
# Many tests wait for processes and sockets, which a busy machine delays. So in a whole run a failed test is repeated once,
# for at most eight tests. Both outcomes are printed, with the traceback, so that a repeated test is not overlooked.
TWICE := --reruns 1 --max-suite-reruns 8 --rerun-show-tracebacks
.DEFAULT_GOAL := help
# Whatever -j says, or MAKEFLAGS: two installations into one environment, or checks beside tests that measure waits.
.NOTPARALLEL:

.PHONY: help demo quick test lint types unit e2e kubernetes fuzz compiled coverage bench faults effect format docs site wheel release-check containers clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The environment is rebuilt when a dependency or a .proto file changes. The demo needs a part of it.
INSTALLED := setup.sh pyproject.toml constraints.txt hatch_build.py $(wildcard protos/flowcontrol/v1/*.proto)

$(VENV)/ready: $(INSTALLED)
	@PYTHON="$(PYTHON)" sh ./setup.sh $(VENV) dev
	@touch $(VENV)/ready-demo $@

$(VENV)/ready-demo: $(INSTALLED)
	@PYTHON="$(PYTHON)" sh ./setup.sh $(VENV) demo
	@touch $@

demo: $(VENV)/ready-demo  ## Run the demo on a real Envoy: with and without flow control, then a picture
	@$(BIN)/flowcontrol demo $(ARGS)

test: lint types unit  ## Run all checks of CI: lint, types, layers, docs, all tests including a real Envoy

# A minute of tests on two idle cores; lint and types 5 s, or a minute the first time. Not included: a real Envoy, a real
# API server, property tests (Hypothesis), and tests of more than a second, such as whole simulations.
quick: lint types  ## Lint, types, and the fast unit tests: under two minutes
	$(BIN)/pytest -m "not e2e and not kubernetes and not slow and not hypothesis" --quiet --numprocesses 2 --dist loadfile $(ARGS)

lint: $(VENV)/ready  ## Style, import layers, docstrings, generated documentation
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/lint-imports --no-cache
	$(BIN)/interrogate --quiet flowcontrol server

types: $(VENV)/ready  ## mypy --strict
	$(BIN)/mypy
	$(BIN)/mypy --strict tests --exclude tests/benchmarks

# Tests on a real Envoy measure waits, so they run one after the other, with nothing beside them.
unit: $(VENV)/ready  ## All tests, including end-to-end tests on a real Envoy
	$(BIN)/pytest -m "not e2e and not kubernetes" --numprocesses auto --dist loadfile $(TWICE) $(ARGS)
	$(BIN)/pytest -m e2e $(TWICE) --durations 15 $(ARGS)

coverage: $(VENV)/ready  ## Lines of the engine that no unit test runs
	$(BIN)/pytest -m "not e2e and not kubernetes" --numprocesses auto --dist loadfile --cov --cov-report=term-missing:skip-covered

e2e: $(VENV)/ready  ## Only the tests on a real Envoy
	$(BIN)/pytest -m e2e $(TWICE) --durations 15 $(ARGS)

kubernetes: $(VENV)/ready  ## Only the tests on a real Kubernetes API server; needs Go, and minutes to build it once
	@$(BIN)/python -m tests.support.control_plane
	$(BIN)/pytest -m kubernetes $(TWICE) --durations 15 $(ARGS)

fuzz: $(VENV)/ready  ## Fuzz every parser of external input, a minute each
	PYTHONPATH=. $(BIN)/python tests/fuzz/parsers.py $(ARGS)

# Without isolation xds-protos is missing: its descriptors are those of the last installation.
# The wheel is unpacked into a separate directory, because it would hide the sources, and used only through its path.
$(COMPILED)/ready: $(VENV)/ready $(shell find flowcontrol server -name '*.py')
	@rm -rf build && FLOWCONTROL_COMPILE=1 $(BIN)/python -m build --wheel --no-isolation --skip-dependency-check --outdir build . >/dev/null
	@$(BIN)/python -m pip install --quiet --no-deps --target $(COMPILED) build/*.whl
	@touch $@

compiled: $(COMPILED)/ready  ## Compile the modules that handle each request, and run all tests on them; needs gcc
	$(ON_COMPILED) -m "not e2e and not kubernetes and not interpreted" --numprocesses auto --dist loadfile $(TWICE) $(ARGS)
	$(ON_COMPILED) -m "e2e and not interpreted" $(TWICE) --durations 15 $(ARGS)

# Each script documents its question, method and caveats, and how to shorten it. ONLY selects scripts. EPP is the built
# endpoint picker of llm-d-router, REFERENCE its source tree.
bench: $(COMPILED)/ready  ## Benchmarks, and the table of targets with pass or miss; needs wrk, valgrind, g++, libgrpc++-dev
	PYTHONPATH=. $(BIN)/python tests/benchmarks/table.py --run $(or $(ONLY),all) $(if $(EPP),--epp $(EPP)) \
	  $(if $(REFERENCE),--reference $(REFERENCE)) $(ARGS)

faults: $(VENV)/ready  ## Kill, stop and starve every part under load: 100,000 requests, under 20 minutes; needs redis-server
	@$(BIN)/python -m tests.faults.run $(ARGS)

# TRACES: the directory of Azure's two traces of 2023; without it, runs that replay one are omitted.
effect: $(VENV)/ready  ## The effect of flow control with default settings, as a table and a picture
	PYTHONPATH=. $(BIN)/python tests/benchmarks/effect.py --traces $(or $(TRACES),traces) $(ARGS)

docs: $(VENV)/ready  ## Regenerate the parts of pages that come from the code
	$(BIN)/python -m tests.support.readme --write

site: $(VENV)/ready  ## Build the documentation into site/, every link checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/ready  ## Apply formatter and safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/ready  ## Build the wheel into dist/
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --wheel .

release-check: $(VENV)/ready  ## The checks before a release: version, wheel, sdist, installation, vulnerabilities, licences
	@.ci/release-check $(ARGS)

containers:  ## Build the image and run docker-compose.yaml, with podman instead of Docker; needs root
	@.ci/containers

clean:  ## Remove all generated files and directories
	rm -rf $(VENV) dist build site flowcontrol/v1 server/flowcontrol_server/common/envoy_messages.binpb demo-result simulation-result *.egg-info .coverage
	rm -rf .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
