# Every target sets up what it needs in .venv, from the pins in constraints.txt, and only when those changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt
VENV312 := .venv312
# Empty where there is none that runs: what pyenv has under this name may be a file that only says so.
PYTHON312 ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python3.12; do \
  "$$python" -c '' 2>/dev/null && command -v "$$python" && break; done)

.PHONY: parity selftest report huggingface test test-slow test-312 lint format venv docs clean

parity: venv  ## both frameworks on four-rank CPU meshes, judged (the smoke grid)
	$(BIN)/parity run --out parity-out

selftest: venv  ## plant bugs, and see each one caught
	$(BIN)/parity selftest --out parity-out

report: venv  ## a page of what the last two left: parity-out/report.html
	$(BIN)/parity report parity-out

huggingface: $(VENV)/.dev  ## both frameworks and the MoE blocks of Hugging Face transformers
	$(BIN)/parity run --grid huggingface --frameworks 'jax,torch,hf-*' --out parity-out/huggingface

test: $(VENV)/.dev  ## the tests that CI runs
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.dev  ## the rest: minutes each
	$(BIN)/python -m pytest -m slow

test-312:  ## the kernels' tests with the newer JAX, where there is a Python 3.12 for it
	$(if $(PYTHON312),$(MAKE) $(VENV312)/.ready,@echo 'skipped: no Python 3.12 here, which JAX 0.11 needs')
	$(if $(PYTHON312),$(VENV312)/bin/python -m pytest -p no:cacheprovider tests/jax_moe/kernels --ignore tests/jax_moe/kernels/test_schedule.py)

lint: $(VENV)/.dev  ## lint, format, import contracts, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(VENV)/.run  ## what running needs: JAX and PyTorch on CPU, and the command `parity`

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(PINS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[parity]'
	@touch $@

$(VENV)/.dev: $(PINS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.run

$(VENV)/.docs: $(PINS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

$(VENV312)/.ready: constraints312.txt
	$(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/python -m pip install --quiet --requirement constraints312.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VENV312) parity-out site
