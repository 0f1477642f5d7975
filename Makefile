# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.saccade-installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint types tests clean

help:
	@echo "make demo   export, build and run the shipped pair of small models, print its table"
	@echo "make test   ruff, mypy and every test"
	@echo "make test-gpu  the tests that need an NVIDIA GPU (PYTHON_GPU: a Python with a CUDA torch)"
	@echo "make clean  remove the virtual environment and all caches"

demo: $(STAMP)
	$(BIN)/saccade demo

test: lint types tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# A file's tests stay together, with what they share. Most of them run one thread; where torch or OpenMP would take
# more, two processes would wait for each other.
JOBS ?= 2
tests: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile

# The set-up above brings whatever torch the index has under that version; a GPU may want its own, so the Python can be named.
PYTHON_GPU ?= $(BIN)/python
test-gpu:
	@$(PYTHON_GPU) -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "make test-gpu: torch " + torch.__version__ + " sees no CUDA device here; name a Python with a CUDA torch on a machine with an NVIDIA GPU: make test-gpu PYTHON_GPU=/path/to/python")'
	$(PYTHON_GPU) -m pytest tests/gpu

# torch first and by its exact version, so that no later range replaces it. An index of CPU builds saves gigabytes of CUDA:
# PIP_EXTRA_INDEX_URL, or a torch that is in the virtual environment already.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saccade needs Python 3.11 or newer, got " + sys.version.split()[0] + "; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): once, a few minutes"
	@$(BIN)/python -m pip install --quiet torch==2.13.0
	@$(BIN)/python -m pip install --quiet --editable '.[export,cpu,train,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
