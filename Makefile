# Every target sets up what it needs in .venv, from the pins in constraints.txt, and only when those changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt

.PHONY: parity selftest report huggingface test test-slow lint format venv docs clean

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

clean:
	rm -rf $(VENV) parity-out site
