# From a clean clone with Python 3.11+ and make: `make demo` runs the demo, `make test` the tests.
# `make PYTHON=python3.12 test` chooses the interpreter; extra pytest options go into PYTEST_ARGS.
# Nothing but the installation uses the network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest transformers, and what it needs besides what $(VENV) holds, lie over it in a folder.
OLDEST := $(VENV)/oldest
OLDEST_PINS := transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
FAST := not long and not gpu
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Another environment that is active, or pip options meant for it, must not reach ours. Where pip
# finds packages (index, certificates, proxies) stays as the machine has it.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PYTHONSTARTUP __PYVENV_LAUNCHER__ \
  PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_REQUIREMENT PIP_PRE PIP_QUIET \
  PIP_NO_DEPS PIP_REQUIRE_HASHES PIP_NO_BUILD_ISOLATION PIP_DRY_RUN PIP_IGNORE_INSTALLED \
  PIP_EDITABLE PIP_SRC PIP_ONLY_BINARY PIP_NO_BINARY PIP_BREAK_SYSTEM_PACKAGES
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# As variables, not options: so they also hold where pip builds the package, under old and new pip.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: help demo test test-long test-gpu test-oldest oldest lint format clean

help:
	@echo "make demo       install into $(VENV) and run the demo: runs/demo/report.html"
	@echo "make test       install and run the fast tests (two cores, at most 10 minutes)"
	@echo "make test-long  install and run the full counts"
	@echo "make test-gpu   install and run what needs an accelerator"
	@echo "make test-oldest what touches transformers, on the oldest that is supported"
	@echo "make lint       ruff (lint and format) and mypy"
	@echo "make format     rewrite the code in the house format"
	@echo "make clean      remove $(VENV) and the tools' caches"

demo: $(VENV)/.installed
	$(BIN)/arra demo --out runs/demo

test: $(VENV)/.installed-dev
	$(PYTEST) -n 2 -m "$(FAST)" $(PYTEST_ARGS)

test-long: $(VENV)/.installed-dev
	$(PYTEST) -n 2 -m "long and not gpu" $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-dev
	$(PYTEST) -m gpu $(PYTEST_ARGS)

oldest: $(OLDEST)/.installed

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/python -c \
	  "import transformers; assert transformers.__version__ == '5.17.0', transformers.__file__"
	PYTHONPATH=$(OLDEST) $(PYTEST) -n 2 -m "$(FAST)" $(PYTEST_ARGS) \
	  tests/unit/integrations tests/unit/models tests/unit/train

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "arra needs Python 3.11 or newer: name one with make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are renewed when what is installed changes, so a second call installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): a few minutes the first time, most of it PyTorch"
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): a few minutes the first time, most of it PyTorch"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $(VENV)/.installed $@

$(OLDEST)/.installed: Makefile | $(VENV)/.installed-dev
	rm -rf $(OLDEST)
	env -u PIP_CONSTRAINT $(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) $(OLDEST_PINS)
	@touch $@
