# Each target sets up what it needs: a virtual environment in .venv with pip, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

# Choose another checkpoint or option:  make serve MODEL=deepseek-ai/DeepSeek-R1-Distill-Qwen-7B ARGS="--port 9000"
MODEL ?=
ARGS ?=

.PHONY: install serve chat test lint bench gpu clean

install: $(STAMP)

serve: $(STAMP)
	@$(BIN)/fathom serve $(MODEL) $(ARGS)

chat: $(STAMP)
	@$(BIN)/fathom chat $(MODEL) $(ARGS)

# The second pass runs the Triton bodies on the CPU; the interpreter is chosen when triton is imported.
test: $(DEV_STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal
	HF_HUB_OFFLINE=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "interpreter and not slow"

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The CPU's benchmarks, peers beside ours, with a table and plots in benchmarks/results. Ten minutes.
bench: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.cpu $(ARGS)

# For a machine with a GPU: its ceilings, whole steps, the GPU tests, every kernel, peers. Ten minutes.
gpu: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fathom needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@# A venv that failed half-way (Debian without python3-venv) would look finished to make.
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(STAMP): $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing Fathom into $(VENV); the first time this downloads PyTorch."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
