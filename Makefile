# Every target does its own set-up: `make demo` and `make test` are all a fresh clone needs.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   ?= runs/demo

CXX_FILES := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.hpp' 'csrc/*.cu' 'csrc/*.cuh' 2>/dev/null)
BUILD_INPUTS := CMakeLists.txt pyproject.toml $(shell find cmake csrc -type f 2>/dev/null)
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help demo emulator cuda test test-cuda test-slow test-asan bench bench-cuda lint tidy format stub docs clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/requirements: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints-dev.txt torch
	$(BIN)/python -m pip install --quiet -c constraints-dev.txt --group dev
	@touch $@

# Editable: Python sources are used in place, the extension is built again when its inputs change.
$(VENV)/installed: $(VENV)/requirements $(BUILD_INPUTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation \
	  -c constraints-dev.txt -C cmake.define.JACPOT_WERROR=ON --editable '.[cli]'
	@touch $@

demo: $(VENV)/installed  ## fit the tangent space of a network on handwritten digits, compare it with training
	$(BIN)/jacpot compare --out $(DEMO)

test: $(VENV)/installed emulator  ## run the test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The logic of the CUDA kernels is tested on the CPU; this needs no nvcc.
emulator: $(VENV)/requirements  ## build the emulator that the tests run the CUDA kernels on
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset emulator >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build --preset emulator

cuda: $(VENV)/requirements  ## compile the extension with its CUDA kernels into build/cuda (needs nvcc)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset cuda
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build --preset cuda

# A build with CUDA in a tree of links, so that the installed one stays as it is. The sanitizers
# slow kernels down a hundredfold: they run on the tests of the kernels alone, with few examples.
CUDA_SITE := build/cuda/site
SANITIZER := $(shell command -v compute-sanitizer 2>/dev/null)
SANITIZED := tests/core/test_devices.py $(wildcard tests/ops/test_masked_matmul*.py tests/ops/test_jacobian*.py)
test-cuda: $(VENV)/installed cuda emulator  ## build with CUDA and run the tests that need a GPU, sanitizers too
	mkdir -p $(CUDA_SITE)
	cp -rsf $(CURDIR)/python/jacpot $(CUDA_SITE)/ && find $(CUDA_SITE)/jacpot -maxdepth 1 -name '_core*.so' -delete
	ln -sf $(CURDIR)/build/cuda/_core*.so $(CUDA_SITE)/jacpot/
	$(BIN)/python tools/run_from.py $(CUDA_SITE) -m pytest -m cuda $(PYTEST_ARGS)
ifneq ($(SANITIZER),)
	for tool in memcheck racecheck; do \
	  HYPOTHESIS_PROFILE=sanitizer $(SANITIZER) --tool $$tool --error-exitcode 1 --report-api-errors no \
	    $(BIN)/python tools/run_from.py $(CUDA_SITE) -m pytest -m cuda --timeout 1800 $(SANITIZED) || exit 1; \
	done
else
	@echo "compute-sanitizer is not on PATH: memcheck and racecheck were left out"
endif

test-slow: $(VENV)/installed  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

# The C++ paths under AddressSanitizer and UndefinedBehaviorSanitizer, in a tree of links so that
# the sanitized extension never mixes with the installed one.
SITE := build/asan-ubsan/site
test-asan: $(VENV)/requirements  ## run the tests of the compiled code under ASan and UBSan
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset asan-ubsan
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build --preset asan-ubsan
	find $(SITE) -type l -delete && cp -rsn $(CURDIR)/python/jacpot $(SITE)/
	LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 HYPOTHESIS_PROFILE=sanitizer \
	  $(BIN)/python tools/run_from.py $(SITE) -m pytest --capture=sys --timeout 1800 $(or $(PYTEST_ARGS),tests/core tests/ops)

# With the Python at hand, which has what it needs: where a GPU is there for minutes, nothing is fetched.
bench-cuda:  ## on a machine with a GPU: build, test, measure and sanitize within 25 minutes
	$(PYTHON) tools/gpu_session.py $(SESSION_ARGS)

bench: $(VENV)/installed  ## run the benchmarks of the primitives, peers alongside
	for script in bench/bench_*.py; do $(BIN)/python $$script || exit 1; done

lint: $(VENV)/installed  ## check formats, types, imports, directions of dependency
	$(BIN)/ruff check python tests bench tools
	$(BIN)/ruff format --check python tests bench tools
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_includes.py
	$(BIN)/python tools/check_isa_symbols.py
	$(BIN)/python tools/make_stub.py --check

# Kernels compiled per instruction set and bindings are left out: they take minutes.
TIDY_FILES = $(filter-out %kernels.cpp csrc/bindings/% %emulator.cpp,$(filter %.cpp,$(CXX_FILES)))
tidy: $(VENV)/requirements  ## run clang-tidy over the portable C++
	$(BIN)/python -m pip install --quiet clang-tidy
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset release >/dev/null
	$(BIN)/clang-tidy -p build/release --quiet --extra-arg=-Wno-deprecated-declarations $(TIDY_FILES)

format: $(VENV)/requirements  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix-only python tests bench tools
	$(BIN)/ruff format python tests bench tools
	$(BIN)/clang-format -i $(CXX_FILES)

stub: $(VENV)/installed  ## write python/jacpot/_core.pyi anew from the extension
	$(BIN)/python tools/make_stub.py

docs: $(VENV)/installed  ## run every example of the documentation
	$(BIN)/python -m pytest tests/test_docs.py tests/test_readme.py $(PYTEST_ARGS)

clean:  ## remove what the other targets made
	rm -rf build dist .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find python tests bench tools -name __pycache__ -type d -prune -exec rm -rf {} +
