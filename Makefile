# The front door: `make demo` and `make test` need Python 3.10 or newer and nothing else.
# PYTHON=python3.12 picks an interpreter; TORCH=torch==2.11.0 TRITON=triton==3.6.0 other versions of these
# than requirements.txt.
PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' requirements.txt)
TRITON ?= $(shell grep '^triton==' requirements.txt)
VENV := .venv
RUN := $(VENV)/bin/python

CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
CXX_FORMATTED := $(CXX_SOURCES) $(wildcard tests/support/cuda_on_cpu/*.h tests/support/cuda_on_cpu/*.c* tests/support/ptx/*.h tests/support/ptx/*.cpp)
NATIVE_SOURCES := $(CXX_SOURCES) $(wildcard csrc/*/*.cmake) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test test-fast executed sanitize lint format docs bench traffic scale-model gpu-model call-cost step-calls tuning mask-update mask-orders \
  sparse-forward gpu-report gpu-first clean help FORCE
help:
	@echo "make demo        train a 98% sparse network on real data with and without this package, and time a step"
	@echo "make test        run all tests"
	@echo "make test-fast   run what needs no compiler, on the reference and the best instruction set: two minutes"
	@echo "make executed    execute the compiled GPU kernels on a CPU, in all tests of the update rule: nine minutes"
	@echo "make sanitize    run the CPU loops under the address and undefined behaviour sanitizers"
	@echo "make bench       measure the speed of a step against PyTorch's own optimizers: 14 minutes, table and pictures"
	@echo "make traffic     count the bytes that the GPU kernels touch, without a GPU"
	@echo "make gpu-model   estimate how long a step takes on an H100, without a GPU"
	@echo "make scale-model compute what 1 to 512 GPUs send and hold, and check it on 4 processes: two minutes, 8 GB"
	@echo "make mask-orders count what another arrangement of the active weights would save a GPU: three minutes"
	@echo "make call-cost   measure what the call of a step costs the host, on a GPU (none is needed) and on a CPU"
	@echo "make step-calls  count the calls of Python functions in a step, and the moves from file to file"
	@echo "make tuning      time the native library with other tuning constants, in forty minutes"
	@echo "make mask-update measure what an update of the masks costs on a CPU, natively and in PyTorch"
	@echo "make sparse-forward measure a Linear layer's forward pass and size, dense and CSR: under a minute"
	@echo "make gpu-report  check and time the GPU kernels on an NVIDIA GPU"
	@echo "make gpu-first   run all that a first NVIDIA GPU is asked for, in ten minutes, into one folder to send to us"
	@echo "make lint        check style and types"
	@echo "make format      put sources into the style that lint checks"
	@echo "make docs        render the documentation into docs/_build/index.html"
	@echo "make clean       remove .venv and everything that was built"

demo: $(VENV)/.package
	$(RUN) -m sparseopt_kernels demo

# Triton decides when it is imported whether it compiles or interprets: two runs.
test: $(VENV)/.package
	$(RUN) -m pytest -n auto
	TRITON_INTERPRET=1 $(RUN) -m pytest -n auto

test-fast: $(VENV)/.package
	$(RUN) -m pytest -n auto -m "not slow and not compiled and not gpu"

# As TRITON_INTERPRET, it decides when tests are collected which kernels they run.
executed: $(VENV)/.package
	SPARSEOPT_TEST_EXECUTED=1 $(RUN) -m pytest -n auto tests/update_rule tests/gpu/test_sector_step.py

sanitize: $(VENV)/.package
	$(RUN) -m pytest tests/kernels/cpu/test_elsewhere.py -k sanitizers

bench: $(VENV)/.package
	$(RUN) -m pytest benchmarks

traffic: $(VENV)/.package
	$(RUN) benchmarks/traffic.py

scale-model: $(VENV)/.package
	$(RUN) benchmarks/scale_model.py --measure

gpu-model: $(VENV)/.package
	$(RUN) benchmarks/gpu_model.py

mask-orders: $(VENV)/.package
	$(RUN) benchmarks/mask_orders.py

call-cost: $(VENV)/.package
	$(RUN) benchmarks/call_cost.py

step-calls: $(VENV)/.package
	$(RUN) benchmarks/step_calls.py

tuning: $(VENV)/.package
	$(RUN) benchmarks/tuning.py

mask-update: $(VENV)/.package
	$(RUN) benchmarks/mask_update.py

sparse-forward: $(VENV)/.package
	$(RUN) benchmarks/sparse_forward.py

gpu-report: $(VENV)/.package
	$(RUN) benchmarks/gpu_report.py

gpu-first: $(VENV)/.package
	$(RUN) benchmarks/gpu_first.py

lint: $(VENV)/.dependencies
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FORMATTED)

# What cannot be mended, lint tells.
format: $(VENV)/.dependencies
	$(RUN) -m ruff check --fix --exit-zero --quiet .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FORMATTED)

# From scratch each time: pages that were rendered before would not give their warnings again.
docs: $(VENV)/.package
	$(RUN) -m sphinx --fresh-env --fail-on-warning --keep-going --nitpicky docs docs/_build

clean:
	rm -rf $(VENV) build docs/_build *.egg-info sparseopt_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# What is installed is installed again when what it was made from has changed.
$(VENV)/requirements.txt: FORCE
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "sparseopt_kernels needs Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@sed 's|^torch==.*|$(TORCH)|; s|^triton==.*|$(TRITON)|' requirements.txt > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(VENV)/.dependencies: $(VENV)/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/.package: $(VENV)/.dependencies $(NATIVE_SOURCES)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps --editable .
	@touch $@
