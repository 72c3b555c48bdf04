# megamoe-jit: every target sets up what it needs in .venv; a second call starts at once.
#
#   make demo | test | test-kernels | test-nvrtc13 | test-engines | test-engines-gpu | test-gpu | test-multi | mutants | bench | docs | lint | format | abi | schemas | env | clean
#
#   PYTHON=python3.12   interpreter that .venv is made from (3.11 or newer)
#   STACK=cu13          CUDA 13 instead of CUDA 12 (environment .venv-cu13)
#   NO_VENV=1           use PYTHON and its packages as they are: no .venv, nothing installed, no network
#   ARGS='-k cache'     extra arguments for pytest, bench and demo
#   RANKS=2             bench: the table from bf16 to bf16 on so many GPUs as well

PYTHON ?= python3
STACK ?= cu12
NO_VENV ?=
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

ifeq ($(NO_VENV),)
VENV ?= $(if $(filter cu12,$(STACK)),.venv,.venv-$(STACK))
PY := $(VENV)/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
stamp = $(VENV)/.ready-$(1)
WORKERS := -n auto --dist loadfile
# Hundreds of processes start in a run; none has to compile modules again, even where the user's environment says so.
test test-kernels test-nvrtc13 test-engines: export PYTHONDONTWRITEBYTECODE :=
else
PY := $(PYTHON)
CLANG_FORMAT := clang-format
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
stamp =
WORKERS :=
endif

# Extras per stamp, and the release of torch that shares its CUDA major with the stack.
extras-run := $(STACK)
extras-bench := $(STACK),bench
extras-docs := $(STACK),docs
extras-dev := $(STACK),dev
torch-cu12 := torch>=2.8,<2.11
torch-cu13 := torch>=2.11
torch-cpu := torch==2.13.0+cpu

.PHONY: help env demo test test-kernels test-nvrtc13 test-engines test-engines-gpu test-gpu test-multi mutants bench docs lint format abi schemas clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

env: $(call stamp,dev)

demo: $(call stamp,run)
	@$(PY) -m megamoe_jit demo $(ARGS)

test: $(call stamp,dev)
	$(PY) -m pytest tests/unit tests/compile $(WORKERS) $(ARGS)
	@echo "not run: plug-ins in the sources of engines (make test-engines, 1.5 GB of wheels), all kernels of all presets (make test-kernels), GPUs (make test-gpu test-multi)"

# Every kernel of every preset, with each variant and format of weights: `make test` compiles a few that have every usual
# pair of properties.
test-kernels: $(call stamp,dev)
	ALL_KERNELS=1 $(PY) -m pytest tests/compile $(WORKERS) $(ARGS)

# The kernels and the runtime's compiler tests once more, with the NVRTC of CUDA 13 in place of CUDA 12's.
NVRTC13 := $(VENV)/nvrtc13
test-nvrtc13: $(call stamp,dev)
	@test -d $(NVRTC13) || $(PY) -m pip install --quiet --no-deps --target $(NVRTC13) 'nvidia-cuda-nvrtc>=13,<14'
	MEGAMOE_JIT_NVRTC=$$(find $(CURDIR)/$(NVRTC13) -name 'libnvrtc.so.13' | head -n 1) \
	  $(PY) -m pytest tests/compile tests/unit/spec/test_abi.py tests/unit/compile/test_nvrtc.py tests/unit/compile/test_cubin.py tests/unit/compile/test_other_nvrtc.py \
	  $(WORKERS) $(ARGS)

# The plug-ins in the sources of the releases they are said to fit, which are fetched once (wheels of a GB, kept as 300 MB).
ENGINES ?= build/engines
test-engines: $(call stamp,dev)
	$(PY) -m tests.engines.fetch $(ENGINES)
	ENGINE_RELEASES=$(abspath $(ENGINES)) $(PY) -m pytest tests/engines $(WORKERS) $(ARGS)

# The same with the real kernels, on Hopper GPUs; ARGS='--ranks 2' on two, one rank on each.
test-engines-gpu: $(call stamp,dev)
	$(PY) -m tests.engines.fetch $(ENGINES)
	ENGINE_RELEASES=$(abspath $(ENGINES)) $(PY) -m tests.engines.on_gpus $(ARGS)

test-gpu: $(call stamp,dev)
	$(PY) -m pytest tests/gpu --require-gpu $(ARGS)

# Skips everything, and says why, where there are not two Hopper GPUs; MEGAMOE_JIT_TEST_RANKS=4 takes fewer than all.
test-multi: $(call stamp,dev)
	$(PY) -m pytest tests/multi $(ARGS)

# Mistakes put into a copy of the product one by one, each of which a test must notice; not a part of `test`.
mutants: $(call stamp,dev)
	$(PY) -m tests.mutants $(ARGS)

bench: $(call stamp,bench)
	@mkdir -p bench-results
	$(PY) -m benchmarks bench --output bench-results/latest.json $(ARGS)
	$(PY) -m benchmarks.from_bf16 --output bench-results/from-bf16.json
	$(if $(RANKS),$(PY) -m benchmarks.from_bf16 --ranks $(RANKS) --output bench-results/from-bf16-$(RANKS)ranks.json)

# The site, in build/site; whatever is wrong with a link, an anchor or a docstring is an error.  Pages keep their places of
# the repository, so that relative links mean the same in both.
docs: $(call stamp,docs)
	@rm -rf build/docs build/site && mkdir -p build/docs
	@ln -s $(addprefix $(CURDIR)/,README.md CHANGELOG.md CONTRIBUTING.md LICENSE benchmarks docs examples) build/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

lint: $(call stamp,dev)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict megamoe_jit benchmarks
	find kernels_src -name '*.cuh' | xargs $(CLANG_FORMAT) --dry-run -Werror

format: $(call stamp,dev)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find kernels_src -name '*.cuh' | xargs $(CLANG_FORMAT) -i

# What Python knows of the kernels' headers; a test says when it is out of date.
abi: $(call stamp,dev)
	$(PY) -m tests.abi > megamoe_jit/_spec/abi.py.new
	mv megamoe_jit/_spec/abi.py.new megamoe_jit/_spec/abi.py

# The schemas of the command line's documents, from the classes of these; a test says when they are out of date.
schemas: $(call stamp,dev)
	$(PY) -m tests.schemas

clean:
	rm -rf .venv .venv-cu12 .venv-cu13 build dist bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ifeq ($(NO_VENV),)
$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "megamoe-jit needs Python 3.11 or newer; $(PYTHON) is not (or is not there). Try: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 3; }
	@echo "== creating $(VENV)" >&2
	@"$(PYTHON)" -m venv --clear "$(VENV)" || \
	  { rm -rf "$(VENV)"; echo "$(PYTHON) could not make a virtual environment; is its venv package installed?" >&2; exit 3; }

# Without an NVIDIA GPU a CPU build of torch is enough, and far smaller; not every package index carries one.
$(VENV)/.ready-%: pyproject.toml | $(VENV)/bin/python
	@echo "== installing megamoe-jit[$(extras-$*)] into $(VENV)" >&2
	@torch='$(torch-$(STACK))'; \
	if ! nvidia-smi -L >/dev/null 2>&1 && $(PY) -m pip install -q --no-input '$(torch-cpu)' 2>/dev/null; then \
	  torch='$(torch-cpu)'; \
	fi; \
	$(PY) -m pip install -q --no-input "$$torch" -e '.[$(extras-$*)]'
	@touch $@ $(if $(filter dev,$*),$(VENV)/.ready-run $(VENV)/.ready-bench $(VENV)/.ready-docs)
endif
