# The verbs of this repository. Each one installs what it needs first (tools/setup.sh) and can be run
# again, offline. VENV and BUILD may name other directories: make test VENV=/tmp/venv BUILD=/tmp/build

VENV ?= .venv
BUILD ?= build
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
STORE ?= memory
PYTEST_ARGS ?=
# Files side by side, each worker with servers of its own: most tests wait for servers and clocks.
WORKERS ?= $(shell expr $(JOBS) + 2)
export VENV BUILD

PY = $(VENV)/bin/python
# Where the wheel is built. The C++ tests are built there too, from the same objects: what is tested is what ships.
TREE = $(BUILD)/python-$$($(PY) -c 'import sys; print(sys.implementation.cache_tag)')
CTEST = ctest --output-on-failure --no-tests=error -j$(JOBS)
CXX_FILES = $(shell find cpp tests/cpp benchmarks -name '*.h' -o -name '*.cc')

.PHONY: help setup demo test test-cpp test-python test-all lint fmt bench docs asan tsan wheel clean

help:
	@echo "make setup      everything all verbs need"
	@echo "make demo       200 tasks against a server that answers 429 above its limit (STORE=postgres or redis: 4 processes)"
	@echo "make test       C++ and Python tests            (PYTEST_ARGS='-k name' for some, WORKERS=0 one by one)"
	@echo "make test-all   + sanitizers, PostgreSQL 12-18, Redis 6.2, Valkey, other Pythons, asyncio debug, uvloop"
	@echo "make lint       formatting, clang-tidy, ruff, mypy, layers        make fmt: apply the formatting"
	@echo "make bench      benchmarks against peers        make docs: the documentation as a site"
	@echo "make asan tsan  C++ tests under sanitizers      make wheel: a wheel in dist/"

setup:
	tools/setup.sh all

demo:
	tools/setup.sh $(if $(filter memory,$(STORE)),demo,demo-$(STORE))
	$(PY) examples/demo.py --store $(STORE)

test: test-cpp test-python

test-cpp:
	tools/setup.sh test
	cmake -D RATESYNC_TESTS=ON $(TREE)
	cmake --build $(TREE) -j$(JOBS)
	cd $(TREE) && $(CTEST)

test-python:
	tools/setup.sh test
	$(PY) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

asan tsan:
	tools/setup.sh test
	cmake --preset $@ -B $(BUILD)/$@
	cmake --build $(BUILD)/$@ -j$(JOBS)
	cd $(BUILD)/$@ && ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 $(CTEST)

test-all: test asan tsan
	tools/setup.sh test-all
	tools/test_matrix.sh

lint:
	tools/setup.sh lint
	clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) tools/check_layers.py
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	cmake --preset release -B $(BUILD)/release
	tools/run_clang_tidy.sh $(BUILD)/release $(JOBS)

fmt:
	tools/setup.sh lint
	clang-format -i $(CXX_FILES)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench:
	tools/setup.sh bench
	$(PY) -m benchmarks $(BENCH_ARGS)

docs:
	tools/setup.sh docs
	$(VENV)/bin/mkdocs build --strict

wheel:
	tools/setup.sh all
	$(PY) -m build --wheel

clean:
	rm -rf $(BUILD) dist site
