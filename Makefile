# Every target makes what it needs: a virtual environment in .venv, the package in it, built.
PYTHON ?= python3
# For machines without a network, whose Python has most of it: see CONTRIBUTING.md, "On a GPU".
VENV_FLAGS ?=
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
# The venv is named by its path everywhere, so that nothing depends on it being activated.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-tests
GPU_STAMP := $(VENV)/.installed-gpu-tests
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find kvx_ext -name '*.cpp' -o -name '*.h' -o -name '*.cu' \
	-o -name '*.cmake')

.PHONY: demo venv test test-all test-gpu check sanitize fuzz bench clean

demo: $(STAMP)
	$(RUN) kvx demo

venv: $(TEST_STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --upgrade pip

# What pyproject.toml asks for to build; in the venv itself, so that rebuilding is incremental.
BUILD_REQUIRES := 'setuptools>=77' 'nanobind>=3.1,<4' 'cmake>=3.26' ninja
INSTALL := $(RUN) $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
EDITABLE := $(INSTALL) --no-build-isolation --editable

$(STAMP): $(BIN)/python $(SOURCES)
	$(INSTALL) $(BUILD_REQUIRES)
	$(EDITABLE) .
	touch $@

$(TEST_STAMP): $(STAMP) tests/requirements-models.txt .ci/servers
	$(EDITABLE) '.[dev,server,s3,bench]'
	$(INSTALL) --requirement tests/requirements-models.txt
	./.ci/servers
	touch $@

# Far less than the other tests need: such a machine may have nothing but what it was given.
$(GPU_STAMP): $(STAMP)
	$(INSTALL) 'pytest>=8'
	touch $@

check: $(TEST_STAMP)
	$(RUN) ./.ci/check

test: check
	$(RUN) pytest -m "not slow and not gpu"

test-all: check sanitize
	KVX_TEST_EXACT_DEADLINES=1 $(RUN) pytest -m "not gpu"

test-gpu: $(GPU_STAMP)
	$(RUN) python -m pytest -c .ci/gpu.ini --rootdir . -m gpu tests/gpu

sanitize: $(TEST_STAMP)
	$(RUN) ./.ci/sanitize

# FUZZ_RUNS=N executions of each target; a million where it is left out.
fuzz: $(TEST_STAMP)
	$(RUN) ./.ci/fuzz

bench: $(TEST_STAMP)
	$(RUN) kvx bench all --quick

clean:
	rm -rf build dist *.egg-info $(VENV) kvx_ext/*.so .mypy_cache .ruff_cache .pytest_cache
