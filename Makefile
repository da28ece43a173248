# FlashOmni's commands; a bare `make` lists them. Everything that they make lies in .venv/, build/ and demo/.
#
#   PYTHON=python3.12   the Python to make the environment from
#   CXX=clang++         the compiler
#   JOBS=8              how much runs at once

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
ifeq ($(origin CXX),default)
CXX := c++
endif

VENV := .venv
BUILD := build/make
BIN := $(abspath $(VENV)/bin)
INSTALLED := $(VENV)/.installed
CPP := $(shell find include src tests examples -name '*.h' -o -name '*.cc' 2>/dev/null)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CMAKE := $(BIN)/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DCMAKE_CXX_COMPILER=$(CXX) \
         -DPython_EXECUTABLE=$(BIN)/python -DFLASHOMNI_PYTHON=ON --log-level=WARNING

.DEFAULT_GOAL := help
.PHONY: help check build demo test test-cpp test-python test-installs cuda-check gpu-record gpu-record-check lint \
        format clean

help: ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

check: ## see whether this machine has what the build needs
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	  "FlashOmni needs Python 3.11 or newer as '$(PYTHON)': install it, or name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
	  "FlashOmni needs Python's venv module: apt-get install python3-venv"; exit 1; }
	@printf '#include <concepts>\n#include <compare>\nint main() { return (1 <=> 2) > 0; }\n' | \
	  $(CXX) -std=c++20 -x c++ -fsyntax-only - 2>/dev/null || { echo \
	  "FlashOmni needs a C++20 compiler as '$(CXX)' (GCC 11 or Clang 14 at least): apt-get install g++"; exit 1; }
	@printf '#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n' | \
	  $(CXX) -fopenmp -x c++ -fsyntax-only - 2>/dev/null || { echo \
	  "FlashOmni needs OpenMP in '$(CXX)': use g++, or for Clang apt-get install libomp-dev"; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt | check
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing what FlashOmni needs into $(VENV)"
	@$(PIP) -c constraints.txt 'cmake>=3.24' ninja 'scikit-build-core>=0.11' 'apache-tvm-ffi>=0.1.12,<0.2'
	@$(PIP) -c constraints.txt --no-build-isolation -C wheel.cmake=false -C editable.mode=inplace \
	  -e '.[diffusers,report,test,lint]'
	@touch $@

build: $(INSTALLED) ## build the native library; the package runs from the checkout
	@$(CMAKE)
	@$(BIN)/cmake --build $(BUILD) -j $(JOBS)

demo: build ## draw pictures dense and sparse, side by side
	@$(BIN)/flashomni demo $(DEMO_ARGS)

test: test-cpp test-python ## build and run all tests that this machine can run

test-cpp: $(INSTALLED)
	@$(CMAKE) -DFLASHOMNI_TESTS=ON
	@$(BIN)/cmake --build $(BUILD) -j $(JOBS)
	@$(BIN)/ctest --test-dir $(BUILD) -j $(JOBS) --output-on-failure --progress

# Processes share the cores with the OpenMP threads of their neighbours, so waiting threads must sleep, not spin.
test-python: build
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TEST_ARGS)

# What the machine's CUDA toolkit lacks comes from packages.
cuda-check: $(INSTALLED) ## compile the CUDA kernels and read what became of them; needs no GPU
	@$(BIN)/python -c 'from flashomni.jit import toolkit; toolkit.find()' 2>/dev/null || \
	  $(PIP) -c constraints.txt --no-build-isolation -C wheel.cmake=false -C editable.mode=inplace -e '.[jit]'
	@$(BIN)/python tools/check_sass.py --ready || $(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	@FLASHOMNI_CACHE_DIR=$(BUILD)/cuda $(BIN)/python tools/check_sass.py

gpu-record: ## on a machine with a GPU: tests, sanitizer, benchmarks -> bench/results/<gpu>.json and docs/gpu-results.md
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) tools/gpu_record.py measure

gpu-record-check: ## see whether the record is of today's kernel sources
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) tools/gpu_record.py check

test-installs: $(INSTALLED) ## install in every way that users may, each in an environment of its own
	@PATH=$(BIN):$$PATH $(PYTHON) tests/installs/installs.py $(TEST_ARGS)

lint: $(INSTALLED) ## check style: ruff and clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(INSTALLED) ## put the style right
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

clean: ## remove everything that was built, and the environment
	rm -rf $(VENV) build demo dist python/flashomni/libflashomni_ffi.so
	find . -name __pycache__ -prune -exec rm -rf {} +
