# Everything a developer runs. `make demo` and `make test` work from a fresh clone: they make the environment first.
#
#   PYTHON=python3.11   the Python to make the environment with
#   VENV=.venv          where the environment lives; `make test VENV=` uses PYTHON's own environment instead
#   ARGS=...            further arguments of demo, test, asan (pytest), bench and gpu
#   OUT=build/gpu       where `make gpu` writes, COMMIT=... what it is told to have measured, where there is no git

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH := torch==2.13.0# installed where the environment has no torch >= 2.11

# One stamp per environment: nothing is installed or built twice, unless a source changed.
ifeq ($(VENV),)
PY := $(PYTHON)
READY := build/.ready-$(subst /,_,$(shell $(PYTHON) -c 'import sys; print(sys.prefix)'))
else
PY := $(abspath $(VENV))/bin/python
READY := $(VENV)/.ready
endif
SOURCES := setup.py pyproject.toml $(shell find csrc python_bindings -name '*.cpp' -o -name '*.cu' -o -name '*.h')
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint bench gpu cuda-compile symbols asan clean

demo: $(READY)
	$(PY) -m hotkernels demo $(ARGS)

test: $(READY)
	$(PY) -m pytest $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Writes to build/bench; ARGS="--out bench/results" publishes.
bench: $(READY)
	$(PY) -m bench $(ARGS)

# Proves the GPU code: on a machine with a GPU, by PYTHON's own torch with CUDA, triton, pytest and nvcc; no network.
OUT ?= build/gpu
gpu:
	$(PYTHON) -m bench.gpu --out "$(OUT)" $(ARGS)

# Every CUDA source for every GPU generation the wheel serves, against the committed limits on registers and spills.
cuda-compile: $(READY)
	$(PY) -m pytest -rs tests/test_build.py -k cuda

# What the built library needs from torch, and which instructions it holds.
symbols: $(READY)
	$(PY) -m pytest -rs tests/test_build.py -k "symbol or instruction"

# The suite under AddressSanitizer and UBSan, in a copy of the tree, so that the normal build stays as it is. Left out:
# torch.compile, which starts a compiler and threads of its own, and the tests of the build. Nothing may capture the
# file descriptor that a sanitizer reports to before it ends the process.
ASAN := $(abspath build/asan)
ASAN_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
HOUSE := csrc python_bindings hotkernels tests bench
library = $(shell $(or $(CXX),g++) -print-file-name=$(1).so)
asan: $(READY)
	mkdir -p $(ASAN) && cd $(ASAN) && rm -rf $(HOUSE)
	tar --exclude='*.so' --exclude=__pycache__ -cf - $(HOUSE) setup.py pyproject.toml README.md LICENSE | tar -xf - -C $(ASAN)
	cd $(ASAN) && HOTKERNELS_BUILD_CUDA=0 HOTKERNELS_LDFLAGS="$(ASAN_FLAGS)" \
	  HOTKERNELS_CXXFLAGS="$(ASAN_FLAGS) -fno-omit-frame-pointer -O1" $(PY) setup.py -q build_ext --inplace >build.log \
	  || (cat build.log; exit 1)
	cd $(ASAN) && LD_PRELOAD="$(foreach l,libasan libubsan libstdc++,$(call library,$(l)))" PYTHONPATH=$(ASAN) \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(PY) -m pytest --capture=sys --ignore tests/test_build.py -k "not compile and not inductor" $(ARGS)

$(READY): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "hotkernels needs Python 3.10 or newer, this is %d.%d: try make PYTHON=python3.11" % sys.version_info[:2])'
	$(if $(VENV),test -x $(PY) || $(PYTHON) -m venv $(VENV))
	@$(PY) -c 'from importlib.metadata import version as v; exit([*map(int, v("torch").split(".")[:2])] < [2, 11])' 2>/dev/null \
	  || (set -x; $(PY) -m pip install -q $(TORCH))
	$(PY) -m pip install -q "setuptools>=77" ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[test,lint,plot]"
	@mkdir -p $(@D) && touch $@

clean:
	rm -rf build dist *.egg-info hotkernels/*.so hotkernels/build_report.txt $(READY)
