# `make demo` and `make test` are the two commands; both make .venv and install into it.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
DATA ?=
export HF_HUB_OFFLINE := 1

.PHONY: help install test lint format demo clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(VENV)/.installed ## make .venv and install everything into it

# A machine without an NVIDIA driver gets PyTorch's CPU build where pip is pointed at one.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77,<81" wheel ninja
	$(BIN)/pip install -q torch==$(TORCH)
	$(BIN)/pip install -q --no-build-isolation -e ".[dev,demo,triton,deepspeed]"
	touch $@

test: install ## run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## rewrite in the house style
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean: ## remove what was built
	rm -rf build *.egg-info ntpseg/*.so .pytest_cache .mypy_cache .ruff_cache
