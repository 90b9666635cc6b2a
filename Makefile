# make help          what there is
# PYTHON=python3.10  the interpreter to use (3.10 to 3.13; default: the first that runs)
# EXTRAS=...         optional packages, see setup.py (default: dev,plots,tensorboard)
# DEMO_DIR, DEMO_UPDATES, DEMO_SOURCE, DEMO_VOCAB_SIZE
#                    where the demo goes, its updates (240), corpus and vocabulary, as `mhmoe prepare english` takes them
# DEMO_JOBS          models of the demo that are trained at the same time, a thread each (2, for 2 cores)

PYTHON ?= $(shell scripts/find_python.sh)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= .venv/$(VERSION)
EXTRAS ?= dev,plots,tensorboard
DEMO_DIR ?= outputs/demo
DEMO_SOURCE ?= web-bible
DEMO_VOCAB_SIZE ?= 4000
DEMO_JOBS ?= 2
VLLM_VENV ?= .venv/vllm
BIN := $(abspath $(VENV))/bin
# Set-up runs once for each choice of extras, and again when what it installs has changed.
STAMP := $(VENV)/.setup-$(EXTRAS)
# One process for each core, each with one thread: the tests' tensors are too small to share. Files in their own order: by
# number of tests, xdist's default, the longest test (alone in its file) would start last, with the other core idle.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
export EXTRAS PYTHON

.PHONY: help setup demo test test-slow test-vllm check docs mutate bench gpu-check clean

help:
	@echo "make setup      environment in .venv/<Python version>, about 3 minutes"
	@echo "make demo       train Dense, X-MoE and MH-MoE on real text, report in outputs/demo/report.md"
	@echo "make test       the default test suite"
	@echo "make test-slow  the tests that train for longer, too"
	@echo "make test-vllm  exported models in vLLM on the CPU, in an environment of its own in .venv/vllm (3 GB)"
	@echo "make check      linters, types, layering, shell scripts, the API reference"
	@echo "make docs       API reference of moe/, parallel/ and experiments/, in outputs/api; a warning is an error"
	@echo "make mutate     put bugs into a copy of the package, see that the tests notice; half an hour, JOBS=N"
	@echo "make bench      speed and memory of the layer, of whole models in training and in use, of several processes"
	@echo "make gpu-check  layer, training, resuming and speed on one CUDA GPU, with a report; 8 minutes at most"
	@echo "make clean      remove the environments and caches (not data, not outputs)"

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml scripts/setup.sh mhmoe_fairseq/moe/cpu/kernels.cpp $(wildcard constraints/*.txt)
	@test -n "$(VERSION)" || { echo "setup: error: no Python 3.10 to 3.13 found that runs (PYTHON=$(PYTHON))" >&2; exit 1; }
	scripts/setup.sh "$(PYTHON)" "$(VENV)"
	@touch $@

demo: $(STAMP)
	PATH="$(BIN):$$PATH" mhmoe prepare english --source $(DEMO_SOURCE) --vocab-size $(DEMO_VOCAB_SIZE) --dest $(DEMO_DIR)/data
	PATH="$(BIN):$$PATH" mhmoe reproduce demo --data $(DEMO_DIR)/data --out $(DEMO_DIR) --jobs $(DEMO_JOBS) $(if $(DEMO_UPDATES),--updates $(DEMO_UPDATES))

test: $(STAMP)
	$(PYTEST) $(TESTS)

test-slow: $(STAMP)
	$(PYTEST) -m "slow or not slow" $(TESTS)

$(VLLM_VENV)/.setup: constraints/vllm.txt scripts/setup_vllm.sh
	scripts/setup_vllm.sh "$(PYTHON)" "$(VLLM_VENV)"
	@touch $@

test-vllm: $(VLLM_VENV)/.setup
	$(MAKE) setup EXTRAS=$(EXTRAS),hf
	MHMOE_VLLM=$(abspath $(VLLM_VENV))/bin/python $(PYTEST) -m slow tests/checkpoints/test_vllm.py \
		"tests/experiments/test_reproduce.py::test_every_experiment_runs_from_data_to_its_report[rebuttal-serving]"

check: $(STAMP)
	PATH="$(BIN):$$PATH" bash scripts/check.sh

docs: $(STAMP)
	PATH="$(BIN):$$PATH" bash scripts/docs.sh outputs/api

mutate: $(STAMP)
	$(BIN)/python scripts/mutate.py --jobs $(or $(JOBS),1)

bench: $(STAMP)
	$(BIN)/python scripts/bench/layer.py
	$(BIN)/python scripts/bench/layer.py --growth --pairs 3
	for size in base small tiny; do $(BIN)/python scripts/bench/model.py --size $$size || exit; done
	$(BIN)/python scripts/bench/model.py --ranks 2 --size small --sentences 16
	$(BIN)/python scripts/bench/model.py --size small --inference
	$(BIN)/python scripts/bench/around.py

gpu-check: $(STAMP)
	$(BIN)/python scripts/gpu_check.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
