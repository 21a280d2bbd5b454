# Every target sets up what it needs: a fresh machine with Python 3.11 or newer is enough.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs tests bench format hooks clean

help:            ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY)   ## fine-tune, compare, merge and save a small model that ships with the package
	$(BIN)/python -m demo

test: lint types docs tests   ## everything that must hold; pytest's summary comes last

lint: $(READY)   ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## static types
	$(BIN)/basedpyright

docs: $(READY)   ## build the manual into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

tests: $(READY)  ## unit tests, laws, doctests and the commands of README.md
	$(BIN)/pytest -q -n $(WORKERS)

bench: $(READY)  ## measure speed and memory, two hours; ARGS=--quick, ARGS='--device cuda'
	$(BIN)/python -m benchmarks $(ARGS)

format: $(READY) ## mend style and formatting in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(READY)  ## check each commit before it is made
	$(BIN)/pre-commit install

clean:           ## remove what the other targets made, the environment too
	rm -rf .venv site build dist .pytest_cache .ruff_cache .hypothesis

# torch goes first and alone: left to itself, pip may swap it for a newer and much larger build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"rankwise needs Python 3.11 or newer, found {v[0]}.{v[1]}; say: make PYTHON=python3.12")'
	@echo "setting up .venv (once; a minute or two)"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq -c constraints.txt torch
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[all]'
	@touch $@
