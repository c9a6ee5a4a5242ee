# Everything sets itself up: Python >= 3.11, a C++20 compiler and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

sources := $(shell find csrc cmake third_party -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml
python_code := python tests bench examples setup.py
cpp_code = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test cuda-table bench lint format asan wheel gpu-check build clean nvcc

demo: $(VENV)/.demo $(VENV)/.build
	$(BIN)/fastok demo

in_parallel := --numprocesses=auto --maxprocesses=4 --dist=loadfile
# Processes with a pool of threads each share the cores better when idle threads sleep than when they spin.
test: $(VENV)/.test $(VENV)/.build $(VENV)/.host_cuda nvcc $(VENV)/.cutlass
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests $(in_parallel)

# What the CUDA kernels' machine code takes and uses, as the tests will hold it to: look at the difference.
cuda-table: $(VENV)/.test nvcc $(VENV)/.cutlass
	PYTHONPATH=tests $(BIN)/python -m cuda_build
	git --no-pager diff --stat -- tests/cuda_build

bench: $(VENV)/.test $(VENV)/.build
	$(BIN)/fastok bench --json bench/results/cpu.json

build: $(VENV)/.build

lint: $(VENV)/.test
	$(BIN)/ruff check $(python_code)
	$(BIN)/ruff format --check $(python_code)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(cpp_code)

format: $(VENV)/.test
	$(BIN)/ruff check --fix $(python_code)
	$(BIN)/ruff format $(python_code)
	$(BIN)/clang-format -i $(cpp_code)

# The CPU kernels under AddressSanitizer and UBSan, on the tests that throw odd shapes at them.
sanitized := sanitizer match select density_peaks k_center max_coverage merge attention attention_backward \
  attention_scores quantize packed_kv decode sparse double_sparse
asan: $(VENV)/.test
	cmake -S . -B build/asan -G Ninja -DFASTOK_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_INSTALL_PREFIX=$(CURDIR)/build/asan/package/fastok -DPython_EXECUTABLE=$(BIN)/python \
	  -DFASTOK_TORCH_DIR=$$($(BIN)/python -c "import os, torch; print(os.path.dirname(torch.__file__))")
	cmake --build build/asan --target install
	cp -r $$(find python/fastok -mindepth 1 -maxdepth 1 ! -name '*.so') build/asan/package/fastok/
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  OMP_WAIT_POLICY=passive PYTHONPATH=$(CURDIR)/build/asan/package $(BIN)/python -m pytest $(sanitized:%=tests/test_%.py) \
	  -k "not triton and not host and not opcheck and not compile" --sanitized $(in_parallel)

wheel: $(VENV)/.test
	$(BIN)/python -m build --wheel --no-isolation

# Everything a GPU can tell, in under nine minutes (tests/gpu_check), with the libraries already built, else built for this
# GPU. Needs no network and no .venv: PYTHON=python3 takes a Python that has torch and pytest. OUT=folder: the reports.
gpu_python = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
gpu-check:
	PYTHONPATH=$(CURDIR)/python:$(CURDIR)/tests $(gpu_python) -m gpu_check $(if $(OUT),--out $(OUT))

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: requirements/demo.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -r requirements/demo.txt
	touch $@

$(VENV)/.test: requirements/test.txt requirements/timm.txt $(VENV)/.demo
	$(BIN)/pip install -q -r requirements/test.txt
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/timm -r requirements/timm.txt
	touch $@

$(VENV)/.build: $(sources) $(VENV)/.demo
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# The CUDA kernels' own source compiled for the host: see tests/host_cuda.
$(VENV)/.host_cuda: $(sources) $(wildcard tests/host_cuda/*) $(VENV)/.test
	cmake -S tests/host_cuda -B build/host_cuda -G Ninja -DPython_EXECUTABLE=$(BIN)/python > /dev/null
	cmake --build build/host_cuda
	touch $@

# PyPI's nvcc where the system has none; without either, the tests that compile for GPUs are skipped.
nvcc:
	@command -v nvcc > /dev/null || $(MAKE) -s $(VENV)/.cuda || \
	  echo "No nvcc on PATH and none to be had from PyPI: the CUDA sources will not be compiled."

$(VENV)/.cuda: requirements/cuda.txt | $(VENV)/bin/python
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/cuda -r requirements/cuda.txt
	ln -sfn lib $(VENV)/cuda/nvidia/cu13/lib64  # where nvcc looks
	touch $@

# CUTLASS's headers, for Hopper's kernels.
$(VENV)/.cutlass: requirements/cutlass.txt | $(VENV)/bin/python
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/cutlass -r requirements/cutlass.txt
	touch $@

clean:
	rm -rf build dist out $(VENV) python/*.egg-info python/fastok/*.so
