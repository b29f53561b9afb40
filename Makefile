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
# vLLM pins hundreds of packages: it has a venv to itself, which finds kvx where it was built.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find kvx_ext -name '*.cpp' -o -name '*.h' -o -name '*.cu' \
	-o -name '*.cmake')

.PHONY: demo venv test test-vllm test-all test-gpu check sanitize fuzz bench clean

demo: $(STAMP)
	$(RUN) kvx demo

venv: $(TEST_STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --upgrade pip

# What pyproject.toml asks for to build; in the venv itself, so that rebuilding is incremental.
BUILD_REQUIRES := 'setuptools>=77' 'nanobind>=3.1,<4' 'cmake>=3.26' ninja
INSTALL := $(RUN) $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
VLLM_TESTS_REQUIRE := 'boto3>=1.40' 'cryptography>=47' 'moto[server]>=5.1' 'obstore>=0.12.1,<0.13' 'pytest>=9' \
	'pytest-asyncio>=1.0' 'pytest-timeout>=2.3'
RUN_VLLM := PATH="$(CURDIR)/$(VLLM_VENV)/bin:$$PATH" python -m pytest -c .ci/vllm.ini --rootdir . tests/connectors/vllm
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

# vLLM's wheel for CPUs brings parts of torch that only GPUs need; the list leaves them out.
$(VLLM_STAMP): tests/requirements-vllm.txt $(STAMP)
	$(PYTHON) -m venv $(VENV_FLAGS) $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps --requirement tests/requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) $(VLLM_TESTS_REQUIRE)
	touch $@

# Far less than the other tests need: such a machine may have nothing but what it was given.
$(GPU_STAMP): $(STAMP)
	$(INSTALL) 'pytest>=8'
	touch $@

check: $(TEST_STAMP)
	$(RUN) ./.ci/check

test: check
	$(RUN) pytest -m "not slow and not gpu"
	@if $(MAKE) $(VLLM_STAMP); then $(MAKE) test-vllm; else echo \
	  "test: vLLM for CPUs cannot be installed here (see above), so its connector is NOT tested" >&2; fi

# The connector in the real engine.
test-vllm: $(VLLM_STAMP) $(TEST_STAMP)
	$(RUN_VLLM) -m "not slow"

test-all: check sanitize $(VLLM_STAMP)
	KVX_TEST_EXACT_DEADLINES=1 $(RUN) pytest -m "not gpu"
	$(RUN_VLLM)

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
	rm -rf build dist *.egg-info $(VENV) $(VLLM_VENV) kvx_ext/*.so .mypy_cache .ruff_cache .pytest_cache
