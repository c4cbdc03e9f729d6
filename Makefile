# Every target does all of its own set-up, into .venv and build/, and is cheap to run again.
#   make demo    train a small network on real data, quantize, pack, run and report (out/)
#   make test    the whole test suite: Python, Python on the kernels of older CPUs, C++, C++ under sanitizers, C++ on
#                emulated ARM
#   make test-slow  thousands of random networks, four minutes at most
#   make bench   throughput of every kernel beside torch
#   make lint    ruff, pyright and clang-format
#   make package an sdist and a wheel, built in isolation and imported from a clean environment
PYTHON ?= python3
TORCH  ?= torch==2.13.0

CEILINGS := reference avx2 avx512_vnni neon_dotprod

VENV    := .venv
BIN     := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test test-python test-slow test-ceilings test-cpp bench lint package clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/bantamweight compress

test: test-python test-ceilings test-cpp

test-python: $(VENV)/installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# What runs on kernels, once for every ceiling that this CPU reaches. Graphs of torch.compile hold the same at all of them.
test-ceilings: $(VENV)/installed
	ceilings=$$($(BIN)/python -c 'from bantamweight import _C; \
	  print(*(isa for isa, missing in _C.isa_table() if not missing and isa in "$(CEILINGS)".split()))') || exit 1; \
	for kernel in $$ceilings; do \
	  echo "kernels up to $$kernel"; \
	  BANTAMWEIGHT_FORCE_KERNEL=$$kernel $(BIN)/python -m pytest tests/nn tests/ops tests/io -k "not compile and not graphs" \
	    || exit 1; \
	done

test-cpp: $(VENV)/tools
	PATH="$(CURDIR)/$(BIN):$$PATH" sh tests/csrc/run.sh native sanitize aarch64

bench: $(VENV)/installed
	$(BIN)/bantamweight bench linear --peers

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	find csrc tests -name '*.cc' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

package: $(VENV)/installed
	rm -rf build/package && mkdir -p build/package
	$(BIN)/python -m build --outdir build/package .
	$(PYTHON) -m venv --system-site-packages build/package/venv
	build/package/venv/bin/python -m pip install -q --no-deps build/package/*.whl
	cd build/package && PYTHONPATH="$$("$(CURDIR)/$(BIN)/python" -c 'import site; print(site.getsitepackages()[0])')" \
	  venv/bin/python -P -c "import sys, bantamweight; assert 'build/package' in bantamweight.__file__, bantamweight.__file__; print(bantamweight.__file__)"

clean:
	rm -rf build dist out *.egg-info python/*.egg-info python/bantamweight/_C*.so

# ---- set-up -------------------------------------------------------------------------------------

# A compiler and Python's venv: installed where we may (root on Debian), asked for in a sentence where not.
$(VENV)/tools:
	@missing=; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq $$missing; \
	  else echo "bantamweight needs$$missing; on Debian or Ubuntu: sudo apt-get install$$missing" >&2; exit 1; fi; fi
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "bantamweight needs Python 3.11 or newer; say which with make PYTHON=python3.12")'
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q setuptools pybind11 cmake ninja build
	touch $@

# torch only if the environment has none; the extension is built once and again when csrc/ changes.
$(VENV)/installed: $(VENV)/tools $(SOURCES)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation -e '.[demo,test]'
	touch $@

$(VENV)/lint: $(VENV)/installed
	$(BIN)/python -m pip install -q -e '.[lint]' --no-build-isolation
	touch $@
