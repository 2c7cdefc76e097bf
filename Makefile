# Six verbs; CI runs the same ones. PYTHON is the interpreter that makes the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per test process: several processes share the cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: install demo style check test test-tools bench

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: install
	$(BIN)/python scripts/train_tiny.py

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mlinter --no-progress --no-cache src/engram_hf/modeling
	$(BIN)/python -m pytest tests/test_import_order.py

test: install
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --maxprocesses 8

# Servers, evaluation, quantizers and exporters: installed beside the rest, or with VENV=.venv/tools apart from it.
test-tools: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,tools]"
	$(TEST_ENV) $(BIN)/python -m pytest tests/tools

bench: install
	@which fio > /dev/null || echo "fio is missing (apt install fio): a libaio loop takes its place"
	$(BIN)/python scripts/bench_memory.py
	$(BIN)/python scripts/bench_hash.py
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python scripts/bench_reads.py
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python scripts/bench_tiers.py
	$(BIN)/python scripts/bench_load.py
	$(BIN)/python scripts/bench_lookup.py
	$(BIN)/python scripts/bench_hot_rows.py
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python scripts/bench_rows.py
	$(BIN)/python scripts/bench_training.py
	$(BIN)/python scripts/bench_checkpoints.py
	$(BIN)/python scripts/bench_callbacks.py
	$(BIN)/python scripts/bench_gpu.py
