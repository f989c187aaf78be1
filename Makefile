# Everything runs in .venv, which is created on first use from the extras of pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST ?= $(shell sh .ci/newest-python)

.PHONY: help demo gallery test test-fast test-flax test-tpu test-onnx test-oldest test-newest lint format docs bench bench-gpu bench-gpu-static bench-tpu clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1: /p' $(MAKEFILE_LIST) | awk -F ': ' '{ printf "  make %-18s %s\n", $$1, substr($$0, length($$1) + 3) }'

demo: $(VENV)/.examples ## trains the paper's variants on digits and plots them, in under 2 minutes; installs 0.9 GB
	@echo "This trains four networks on 8 x 8 digits, with and without batch norm, for 2 minutes, and draws a plot"
	$(BIN)/python examples/speedup.py

gallery: $(VENV)/.examples ## the pictures of docs/pages/gallery.md: its ten examples, 20 minutes on two idle cores; installs what `demo` does
	$(BIN)/python docs/gallery.py

test: $(VENV)/.test ## the whole suite, 15 minutes on two cores; installs 2.3 GB with PyTorch for CPUs, 5.8 GB with PyPI's on Linux
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(VENV)/.test ## the fast tests, 3 minutes; installs what `test` does
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-flax: $(VENV)/.test ## Flax's tests of these layers, run on normjax's layers, 5 minutes; needs FLAX=a checkout, and what `test` installs
	$(BIN)/python tests/flax_suite.py $(FLAX)

test-tpu: ## programs for TPU pods, compiled on this machine, half a minute; 1.3 GB in its own environment, since JAX starts any libtpu that it finds
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/python -m pip install --quiet --editable ".[tpu-aot]"
	$(VENV)-tpu/bin/python -m pytest tests/tpu_aot

test-onnx: ## inference as ONNX files, compared with onnxruntime, 3 minutes; 1.1 GB in its own environment, since jax2onnx requires an older orbax-checkpoint
	$(PYTHON) -m venv $(VENV)-onnx
	$(VENV)-onnx/bin/python -m pip install --quiet --editable ".[onnx]"
	$(VENV)-onnx/bin/python -m pytest tests/onnx

test-oldest: ## the suite on the oldest versions that pyproject.toml allows, 15 minutes; installs about what `test` does
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable ".[test]"
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist worksteal

test-newest: ## the fast suite on the newest Python that is installed, with the newest JAX, 3 minutes; installs 5.8 GB with the PyTorch of PyPI
	@test -n "$(NEWEST)" || { echo "No Python 3.12 or newer is installed here"; exit 1; }
	$(NEWEST) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --editable ".[test]"
	$(VENV)-newest/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(VENV)/.dev ## formatting, lint and types, a minute; installs what `test` does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev ## formats the code and mends what lint can, a few seconds; installs what `test` does
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs ## the site, in site/, a minute; installs 1 GB
	$(BIN)/python -m sphinx -W -q -c docs -b html docs/pages site

bench: $(VENV)/.bench ## times layers and training steps and their peers on this backend, in half an hour; installs what `test` does, and libtpu
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/layers.py --suite sync
	$(BIN)/python benchmarks/layers.py --suite drawn
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/small.py
	$(BIN)/python benchmarks/overhead.py --json benchmarks/results/overhead-cpu.json
	$(BIN)/python benchmarks/plot.py benchmarks/results/layers-cpu.json docs/pages/images/layers-cpu.svg

bench-gpu: ## all GPU benchmarks, in under 8 minutes, with the packages of python3 or PYTHON=...; installs nothing
	$(PYTHON) benchmarks/gpu.py

bench-gpu-static: ## bytes and estimated times of GPU programs, compiled for an H100, 10 minutes; needs no GPU; 5 GB in its own environment, since it needs CUDA
	@echo "The first call downloads about 5 GB, into $(VENV)-gpu; all programs then take about 10 minutes on two cores"
	$(PYTHON) -m venv $(VENV)-gpu
	$(VENV)-gpu/bin/python -m pip install --quiet --editable ".[gpu-static]"
	$(VENV)-gpu/bin/python benchmarks/gpu_static.py
	$(VENV)-gpu/bin/python benchmarks/plot.py benchmarks/results/gpu-static-h100.json docs/pages/images/gpu-static.svg --peers normjax flax.linen formula

bench-tpu: $(VENV)/.bench ## bytes and estimated cycles of TPU programs; needs no TPU; half an hour; installs what `bench` does
	$(BIN)/python benchmarks/formulations.py --tpu v5e:2x2 --batch 64
	$(BIN)/python benchmarks/static.py
	$(BIN)/python benchmarks/memory.py --out benchmarks/results/memory-v5e-1.json

clean: ## removes everything that these targets created
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-tpu $(VENV)-onnx $(VENV)-gpu .jax_cache site

# First says what the target does, installs and takes; then shows pip's progress.
$(VENV)/.%: pyproject.toml
	@$(MAKE) -s help | grep -F "make $(firstword $(MAKECMDGOALS)) " || true
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "Python 3.11 or newer with venv is needed (Debian: apt install python3-venv)"; exit 1; }
	@echo "Installing the packages of the extra \`$*\` into $(VENV)"
	@case $* in test | dev | bench) \
	  echo "With PyTorch: on Linux, PyPI's build brings gigabytes of CUDA. For the build for CPUs add"; \
	  echo "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu to this command";; \
	esac
	@$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable ".[$*]"
	@touch $@
