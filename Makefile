# What people and CI run; `make help` lists it. PYTHON is the interpreter that makes the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# CI adds a file with another release of transformers.
CONSTRAINTS ?= constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet $(addprefix -c ,$(CONSTRAINTS))
# One thread per test process, because several processes share the cores.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
PARALLEL := -n auto --maxprocesses 8
# Threads that wait for the disk must not spin.
BENCH := OMP_WAIT_POLICY=PASSIVE $(BIN)/python scripts/benchmarks
FAST := tests/test_import_order.py tests/test_public_names.py tests/test_planning.py \
	tests/modeling/test_configuration_engram_moe.py tests/modeling/test_ids_hashing.py \
	tests/modeling/test_ids_reach.py tests/modeling/test_documents.py tests/modeling/test_memory_layer.py \
	tests/modeling/test_table.py tests/modeling/test_outputs.py tests/checkpoints/test_inspecting.py \
	tests/training/test_row_rules.py tests/training/test_balancing.py

.PHONY: help install demo demo-any style check test-fast test test-all test-tools bench gpu gpu-wheels

help: ## print the verbs
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## make .venv with the package and everything that scripts and tests need

$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e ".[dev]"
	touch $(STAMP)

demo: install ## train a small model in about two minutes and show what its memory does
	$(BIN)/python scripts/train_tiny.py

demo-any: install ## add a memory to a pretrained model of 135 million parameters: under eight minutes
	$(BIN)/python scripts/add_memory.py --overwrite

style: install ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: install ## lint, types, import order, rendered pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mlinter --no-progress --no-cache src/engram_hf/modeling
	$(BIN)/python scripts/maintenance/render_results.py --check
	$(BIN)/python scripts/experiments/report.py --check
	$(BIN)/python -m pytest tests/test_import_order.py

test-fast: install ## hash, table and memory layer: under 90 seconds
	$(PYTEST) $(PARALLEL) -m "not slow" $(FAST)

test: install ## everything but what is marked slow: about six minutes on two cores
	$(PYTEST) $(PARALLEL) -m "not slow"

test-all: install ## what is marked slow: killed runs, damaged files by the thousand, inductor, a release
	$(PYTEST) $(PARALLEL) -m slow

test-tools: install ## install servers, evaluation, quantizers and exporters, and drive them
	$(PIP_INSTALL) -e ".[dev,tools]"
	@# Apart, and without what it depends on: it would bring another build of torch.
	-$(BIN)/python -m pip install --quiet --upgrade --no-deps --target .torchrec -r tests/tools/torchrec_requirements.txt
	$(PYTEST) tests/tools

bench: install ## every benchmark, about an hour; figures go to scripts/benchmarks/results and docs/results.md
	@which fio > /dev/null || echo "fio is missing (apt install fio): a libaio loop takes its place"
	$(BENCH)/bench_memory.py
	$(BENCH)/bench_hash.py
	$(BENCH)/bench_reads.py
	$(BENCH)/bench_tiers.py
	$(BENCH)/bench_load.py
	$(BENCH)/bench_lookup.py
	$(BENCH)/bench_rows.py
	$(BENCH)/bench_training.py
	$(BENCH)/bench_checkpoints.py
	$(BENCH)/bench_callbacks.py
	$(BENCH)/bench_trace.py
	$(BENCH)/bench_patches.py
	$(BENCH)/bench_other_tables.py
	$(BENCH)/bench_per_layer_embeddings.py
	$(BENCH)/bench_added_memory.py
	$(BENCH)/bench_ranks.py
	$(BENCH)/bench_rank_sums.py
	$(BENCH)/bench_gpu.py
	$(BIN)/python scripts/maintenance/render_results.py

# These two need no `make install`: a machine with a GPU may have no network.
gpu: ## every test and benchmark that needs a GPU, and nothing else
	PYTHON=$(PYTHON) bash scripts/maintenance/gpu.sh

gpu-wheels: ## download the packages that a GPU machine without a network lacks
	PYTHON=$(PYTHON) bash scripts/maintenance/gpu.sh wheels
