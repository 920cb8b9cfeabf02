# Two commands matter: `make demo` runs the main job, `make test` proves it.
# Both set up their own virtual environment in .venv first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
COMPILED := build/compiled
ON_COMPILED = PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(COMPILED) $(BIN)/pytest -o pythonpath="$(COMPILED) ."
# Many tests wait for processes and sockets that a busy machine holds up. So in a whole run a test that fails is run once
# more; eight such in all. Both outcomes are printed, with the traceback, so that nobody overlooks a test that needed it.
TWICE := --reruns 1 --max-suite-reruns 8 --rerun-show-tracebacks
.DEFAULT_GOAL := help

.PHONY: help demo quick test lint types unit e2e kubernetes fuzz compiled coverage bench faults effect format docs site wheel release-check containers clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The environment is rebuilt when a dependency or a .proto file changes. A demo needs a part of it.
INSTALLED := setup.sh pyproject.toml constraints.txt hatch_build.py $(wildcard protos/flowcontrol/v1/*.proto)

$(VENV)/ready: $(INSTALLED)
	@PYTHON="$(PYTHON)" sh ./setup.sh $(VENV) dev
	@touch $(VENV)/ready-demo $@

$(VENV)/ready-demo: $(INSTALLED)
	@PYTHON="$(PYTHON)" sh ./setup.sh $(VENV) demo
	@touch $@

demo: $(VENV)/ready-demo  ## The main job on a real Envoy: with and without flow control, then a picture
	@$(BIN)/flowcontrol demo $(ARGS)

test: lint types unit  ## Everything CI checks: lint, types, layers, docs, unit to real-Envoy tests

# A minute of tests on two idle cores; lint and types 5 s, or a minute the first time. Left out: a real Envoy, a real API
# server, tests of properties (Hypothesis), and what takes more than a second, such as whole simulations.
quick: lint types  ## Lint, types, and the unit tests that take no time: under two minutes
	$(BIN)/pytest -m "not e2e and not kubernetes and not slow and not hypothesis" --quiet --numprocesses 2 --dist loadfile $(ARGS)

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
	$(BIN)/pytest -m "not e2e and not kubernetes" --numprocesses auto --dist loadfile $(TWICE) $(ARGS)
	$(BIN)/pytest -m e2e $(TWICE) --durations 15 $(ARGS)

coverage: $(VENV)/ready  ## Which lines of the engine no unit test runs
	$(BIN)/pytest -m "not e2e and not kubernetes" --numprocesses auto --dist loadfile --cov --cov-report=term-missing:skip-covered

e2e: $(VENV)/ready  ## Only the tests on a real Envoy
	$(BIN)/pytest -m e2e $(TWICE) --durations 15 $(ARGS)

kubernetes: $(VENV)/ready  ## Only the tests on a real Kubernetes API server; needs Go, and minutes to build it once
	@$(BIN)/python -m tests.support.control_plane
	$(BIN)/pytest -m kubernetes $(TWICE) --durations 15 $(ARGS)

fuzz: $(VENV)/ready  ## Every parser of what others wrote against odd input, a minute each
	PYTHONPATH=. $(BIN)/python tests/fuzz/parsers.py $(ARGS)

# Without isolation xds-protos is not there: its descriptors are those of the last installation.
# The wheel is unpacked beside the sources, which it would hide, and used only where a path says so.
$(COMPILED)/ready: $(VENV)/ready $(shell find flowcontrol server -name '*.py')
	@rm -rf build && FLOWCONTROL_COMPILE=1 $(BIN)/python -m build --wheel --no-isolation --skip-dependency-check --outdir build . >/dev/null
	@$(BIN)/python -m pip install --quiet --no-deps --target $(COMPILED) build/*.whl
	@touch $@

compiled: $(COMPILED)/ready  ## Compile what is on the way of a request, and run all tests on that; needs gcc
	$(ON_COMPILED) -m "not e2e and not kubernetes and not interpreted" --numprocesses auto --dist loadfile $(TWICE) $(ARGS)
	$(ON_COMPILED) -m "e2e and not interpreted" $(TWICE) --durations 15 $(ARGS)

# Each script says its question, method, caveats, and how to run it shorter. ONLY names some of them. EPP and
# REFERENCE are llm-d-router's endpoint picker, built, and its tree.
bench: $(COMPILED)/ready  ## Benchmarks, and the table of targets with pass or miss; needs wrk, valgrind, g++, libgrpc++-dev
	PYTHONPATH=. $(BIN)/python tests/benchmarks/table.py --run $(or $(ONLY),all) $(if $(EPP),--epp $(EPP)) \
	  $(if $(REFERENCE),--reference $(REFERENCE)) $(ARGS)

faults: $(VENV)/ready  ## Kill, stop and starve every part under load: 100,000 requests, under 20 minutes; needs redis-server
	@$(BIN)/python -m tests.faults.run $(ARGS)

# TRACES: the directory of Azure's two traces of 2023; what replays one is left out where it is not.
effect: $(VENV)/ready  ## What flow control does for people with nothing set, as a table and a picture
	PYTHONPATH=. $(BIN)/python tests/benchmarks/effect.py --traces $(or $(TRACES),traces) $(ARGS)

docs: $(VENV)/ready  ## Rewrite what pages quote from the code
	$(BIN)/python -m tests.support.readme --write

site: $(VENV)/ready  ## Build the documentation into site/, every link checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/ready  ## Apply formatter and safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/ready  ## Build the wheel into dist/
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --wheel .

release-check: $(VENV)/ready  ## What must hold before a release: version, wheel, sdist, installation, known faults, licences
	@.ci/release-check $(ARGS)

containers:  ## Build the image and run docker-compose.yaml, with podman in place of Docker; needs root
	@.ci/containers

clean:  ## Remove everything made here
	rm -rf $(VENV) dist build site flowcontrol/v1 server/flowcontrol_server/common/envoy_messages.binpb demo-result simulation-result *.egg-info .coverage
	rm -rf .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
