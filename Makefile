# Everything a newcomer needs: `make demo` draws, `make test` checks. Each does its own set-up, once,
# in .venv; nothing but Python 3.11 or newer and make has to be there before.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.PHONY: help demo test lint bench clean setup

VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.ready
ARGS   ?=

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(STAMP)  ## draw a captioned grid of 16 prompts with the bundled model, to outputs/demo.png
	@mkdir -p outputs
	@$(PY) -m ldm_pipeline.cli generate --prompts configs/demo_prompts.txt --grid --seed 1 -o outputs/demo.png
	@echo "The pictures are in $(CURDIR)/outputs/demo.png"

test: $(STAMP)  ## run the tests (choose some with ARGS="-k schedule")
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(PY) -m pytest -q -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)  ## ruff's checks and format, mypy's types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

bench: $(STAMP)  ## measure the command's start, and pictures against stock diffusers, on this machine
	@$(PY) benchmarks/cli_latency.py
	@$(PY) benchmarks/sampling.py

setup: $(STAMP)  ## only make .venv and install into it

clean:  ## remove caches, build outputs and what the demo wrote (.venv and runs/ stay)
	rm -rf outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The interpreter: PYTHON=… if given, else the first that is new enough and can make environments;
# 3.11 first, because the pins in constraints.txt were tested on it.
$(PY):
	@for p in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
		if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$p"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "make: Python 3.11 or newer with its venv module is needed (found: $$(python3 --version 2>&1 || echo none)); install it (Debian: python3-venv) or name it, make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$($$found --version)"; "$$found" -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(PY)
	@echo "Installing into $(VENV): once, some minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[train,datasets,notebooks,dev]' -c constraints.txt
	@touch $@
