PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TIER ?= pr
PLACES := and (place or not elsewhere) and not night
BASE_IMAGE ?= python:3.12-slim-bookworm
IMAGE ?= agent-server:latest
WHEELHOUSE ?=
UV_VERSION := 0.13.9

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := agent_sdk workspaces agent_server
MANYLINUX := manylinux_2_36 manylinux_2_34 manylinux_2_28 manylinux_2_17 manylinux2014 manylinux2010 manylinux1

# With this, every server and box that a test starts would compile itself anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo examples run-server test test-docker test-all test-images cover lint fmt types contracts bench house docs docs-check image box-runtime chaos lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(READY) ## make .venv with everything development needs

# Looked at first, and by words that Python 2 understands, too. A folder that another Python began is begun anew.
$(READY): requirements/dev.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) --version says: $$($(PYTHON) --version 2>&1 | tail -n 1); name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check # the lock has what setup.cfg asks for
	@touch $@

demo: $(READY) ## start a server, run a real task against it, show what happened, stop
	$(BIN)/python -m examples.demo $(ARGS)

examples: $(READY) ## run the examples against a server of their own
	$(BIN)/python -m examples

run-server: $(READY) ## run a server in the foreground (ARGS="--port 0")
	$(BIN)/agent-server serve $(ARGS)

test: $(READY) ## run the tests that need no container engine (ARGS="-k name")
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not docker and not chaos $(PLACES)" $(ARGS)
	@echo "Not among them: tests of containers (make test-docker, needs a Docker engine) and of faults (make chaos)."
	@echo "Contracts were tried in full in three places, and in the others where these matter (make test-all: in full)."

test-images: $(READY) ## make the images that tests of containers use, without any registry
	$(BIN)/python -m tests.docker.images
	$(MAKE) image BASE_IMAGE=agent-test/full:1 IMAGE=agent-test/server:1

test-docker: $(READY) ## run the tests that need a container engine, and the images of test-images
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "docker $(PLACES)" tests/docker $(ARGS)

test-all: ## run all tests, all contracts in all places: every night (needs what test-docker and chaos need)
	$(MAKE) test test-docker chaos PLACES= TIER=night

cover: $(READY) ## run the tests and show the branches they miss
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not docker and not chaos" $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(READY) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: $(READY) ## format the code and apply the safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: $(READY) ## check types
	$(BIN)/mypy $(PACKAGES) $(wildcard examples bench tools) tests/typed_by_users.py

contracts: $(READY) ## check who may import whom
	$(BIN)/lint-imports --no-logo --no-cache

bench: $(READY) ## measure, next to the physical limits; writes bench/results.json
	$(BIN)/python -m bench $(ARGS)

house: $(READY) ## count the lines and files of the product, and what a call crosses
	$(BIN)/python -m bench.house $(ARGS)

docs: $(READY) ## write the references in docs/ from the code
	$(BIN)/python -m tools.documents

docs-check: $(READY) ## fail when a generated reference is stale
	@$(BIN)/python -m tools.documents --check

# The wheels are for the Python of the base; given a wheelhouse, nothing is fetched.
image: $(READY) ## build the container image (BASE_IMAGE= IMAGE= WHEELHOUSE=folder)
	rm -rf build/image build/lib && mkdir -p build/image/wheels
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --wheel-dir build/image/wheels . && rm -rf build/lib build/bdist.*
	if [ -n "$(WHEELHOUSE)" ]; then cp $(WHEELHOUSE)/*.whl build/image/wheels/; else \
	  found=$$(docker run --rm --network none --entrypoint python3 $(BASE_IMAGE) -c \
	    'import os, sys; print("%d.%d" % sys.version_info[:2], os.uname().machine)') && \
	  set -- $$found && \
	  $(BIN)/python -m pip download --quiet --disable-pip-version-check --require-hashes --only-binary :all: \
	    --python-version "$$1" $(MANYLINUX:%=--platform %_"$$2") \
	    --dest build/image/wheels -r requirements/server.txt; \
	fi
	docker build --quiet --tag $(IMAGE) --build-arg BASE_IMAGE=$(BASE_IMAGE) \
	  --build-arg VERSION=$$($(BIN)/python -c 'from agent_sdk.version import __version__; print(__version__)') \
	  --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) .

box-runtime: $(READY) ## make what a box needs to run in any image
	$(BIN)/python -m workspaces.box.runtime build/box-runtime

chaos: $(READY) ## break things at random and check the guarantees (SEED=1 ONLY=name TIER=pr|night|release)
	CHAOS_SEED=$(SEED) CHAOS_TIER=$(TIER) $(BIN)/python -m pytest -n 2 tests/chaos -m chaos -k "$(ONLY)" $(ARGS)

lock: ## resolve requirements anew (ARGS="--upgrade")
	$(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	.cache/lock/bin/uv pip compile setup.cfg --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --quiet --output-file requirements/dev.txt $(ARGS)
	.cache/lock/bin/uv pip compile setup.cfg --extra cli --extra secrets --universal --python-version 3.11 \
	  --generate-hashes --constraint requirements/dev.txt \
	  --no-emit-index-url --no-header --quiet --output-file requirements/server.txt

clean: ## remove everything that can be made again
	rm -rf .venv .venv-* .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache \
	  .coverage .coverage.* htmlcov build dist *.egg-info
	find $(PACKAGES) tests $(wildcard examples bench tools) -name __pycache__ -type d -prune -exec rm -rf {} +
