# Every target makes what it needs; the first one that needs it installs the pinned packages into $(VENV).
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-oldest lint format bench gpu-test gpu-bench readme clean

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/installed ## A virtual environment with the pinned packages
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: install ## Train a ViT with ripple attention on 1797 digit images, reload it, pack it for the Hub
	$(BIN)/hf-attn train configs/vit_ripple_digits.yaml

test: lint ## Lint, types and the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 8

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints-oldest.txt -e ".[test]"
	@touch $@
test-oldest: $(OLDEST)/installed ## The test suite with the oldest transformers that is supported
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses 8

lint: install ## Ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the budgets at which mechanisms are compared: 64 landmarks or features, blocks of 64, 4 blocks a row
BENCHED := softmax rfa randomized lara:num_landmarks=64 eva:window_size=64,chunk_size=16 ripple topological \
	mra:block_per_row=4 hypercube:block_size=64 context_pool vars generalized generalized:beta=0010 deformable dynamic_conv \
	relative_2d relu2 laplace softmax_plus mixed_chunk
bench: install ## Time and memory of every mechanism on this machine's CPU, gated by correctness
	$(BIN)/python scripts/bench.py $(BENCHED) --lengths 1024 2048 4096 --output docs/benchmarks/cpu
	$(BIN)/python scripts/bench.py softmax --model bert --output docs/benchmarks/cpu
	$(BIN)/python scripts/bench.py rfa lara:num_landmarks=64 performer-pytorch --lengths 2048 4096 --output docs/benchmarks/cpu_performer
	$(BIN)/python scripts/bench.py flash_gau gau FLASH-pytorch FLASH-pytorch-GAU --lengths 2048 --no-memory --repeats 4 --output docs/benchmarks/cpu_gau
	$(BIN)/python scripts/bench.py flash_gau FLASH-pytorch --lengths 4096 --no-causal --no-memory --repeats 4 --output docs/benchmarks/cpu_gau_4096
	$(BIN)/python scripts/bench.py relative_2d --lengths 196 --output docs/benchmarks/cpu_vit
	$(BIN)/python scripts/bench.py relative_2d --model vit --layers 1 --batch 1 --lengths 196 --output docs/benchmarks/cpu_vit
	$(BIN)/python scripts/bench.py aa_resnet --model resnet --no-backward --output docs/benchmarks/cpu_resnet
	$(BIN)/python scripts/bench.py aa_resnet --model resnet --no-backward --batch 4 --output docs/benchmarks/cpu_resnet_batch4
	$(BIN)/python scripts/update_numbers.py

gpu-test: ## Kernels against their definitions on a GPU, with the Python that is active
	$(PYTHON) -m pytest -m gpu

gpu-bench: ## Time and memory of every mechanism on a GPU, with the Python that is active
	$(PYTHON) scripts/bench.py $(BENCHED) --lengths 1024 4096 16384 --device cuda --dtype bfloat16 --batch 8 --heads 12 --output docs/benchmarks/gpu

readme: install ## Write the generated table of capabilities into README.md
	$(BIN)/python scripts/update_readme.py

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(OLDEST) runs dist .pytest_cache .ruff_cache .mypy_cache
