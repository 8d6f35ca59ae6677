# Every command of the project by one name, the same here and in continuous integration. `make help` lists them.
SHELL := /bin/bash
# A list of requirements that could not be made is no empty one.
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= tiny-chat
PORT ?= 8000
RUST_SOURCES := $(shell find rust -name '*.rs' -o -name 'Cargo.toml' -o -name '*.c' 2>/dev/null) Cargo.toml Cargo.lock pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help build serve demo test test-all mutants lint bench cuda clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch is most of the environment and does not change with our code, so it is a stamp of its own.
$(VENV)/.environment: pyproject.toml
	@echo "== making the environment in $(VENV) (once, about a minute)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "maturin>=1.16,<2"
	$(BIN)/python tools/requirements.py node gguf dev bench | $(BIN)/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
	@touch $@

$(VENV)/.built: $(VENV)/.environment $(RUST_SOURCES)
	@echo "== compiling the core (two to four minutes the first time, seconds afterwards)"
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --quiet
	@touch $@

build: $(VENV)/.built  ## the environment and the compiled core

# nvcc in an environment of its own: it needs other versions of packages that torch's wheels pin.
.build/nvcc/.installed: pyproject.toml
	@echo "== installing nvcc in .build/nvcc (once, 280 MB)"
	$(PYTHON) -m venv .build/nvcc
	$(PYTHON) tools/requirements.py --only cuda-compiler | .build/nvcc/bin/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
	@touch $@

cuda: $(VENV)/.environment .build/nvcc/.installed  ## compile the CUDA kernels for every architecture, as package data
	$(BIN)/python -m tools.cuda_build

serve: build  ## serve MODEL (default tiny-chat) on PORT (default 8000)
	$(BIN)/python -m llmscale.cli serve $(MODEL) --port $(PORT)

demo: build  ## stream an answer, kill the worker in the middle, see that the answer goes on
	$(BIN)/python examples/kill_the_worker.py

test: build .build/nvcc/.installed  ## everything that needs no GPU and no minutes: Rust, Python, lint of the contracts
	cargo nextest run --workspace --no-fail-fast
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu and not slow"

test-all: build .build/nvcc/.installed  ## also what takes minutes
	cargo nextest run --workspace --no-fail-fast --run-ignored all
	$(BIN)/python -m pytest -m "not gpu"

mutants:  ## plant one bug after the other in the core and see which simulated world finds it
	cargo nextest run -p llmscale-sim --test mutants --no-capture

lint: build  ## rustfmt, clippy, ruff, mypy
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy

bench: build  ## list the benchmarks; run one with .venv/bin/python -m bench NAME
	$(BIN)/python -m bench --list

clean:  ## remove everything that make has made
	rm -rf $(VENV) .build target python/llmscale/*.so python/llmscale/cuda/images
