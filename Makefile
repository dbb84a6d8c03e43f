# One verb for each thing that a person wants. The environment is made on first use.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := build-demo
FIGURES := build-bench
COVERAGE := build-coverage

RUST_SOURCES := $(shell find rust -name '*.rs' -o -name Cargo.toml)

.PHONY: help demo test test-rust test-python coverage sweep bench picture lint format clean

help: ## Show the verbs.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-14s %s\n", $$1, $$2}'

# Editable: Python changes need no reinstall, Rust changes do.
$(VENV)/installed: pyproject.toml Cargo.toml Cargo.lock $(RUST_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed ## Analyse a real model, allocate ranks, build the PEFT model.
	$(BIN)/python examples/demo.py $$($(BIN)/python -m tests.support.material minilm) $(DEMO)

test: test-rust test-python ## Run all tests.

test-rust:
	cargo test --release --package lorank

test-python: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

coverage: $(VENV)/installed ## Run the Python tests with branch coverage (14 minutes); see build-coverage.
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal --cov --cov-report term --cov-report html:$(COVERAGE)

sweep: $(VENV)/installed ## Allocate for and extract from every architecture of transformers (about 3 minutes).
	$(BIN)/pytest -m slow -s

bench: $(VENV)/installed ## Measure speed and memory beside the peers (about two hours).
	$(BIN)/pip install --quiet --editable '.[bench]'
	mkdir -p $(FIGURES)
	cargo bench --package lorank --features bench --bench phases -- --json $(abspath $(FIGURES))/phases.json
	$(BIN)/python -m benches.spectra --json $(FIGURES)/spectra.json
	$(BIN)/python -m benches.analyze --json $(FIGURES)/analyze.json
	$(BIN)/python -m benches.compress --json $(FIGURES)/compress.json
	$(BIN)/python -m benches.selection --json $(FIGURES)/selection.json
	$(BIN)/python -m benches.threads --json $(FIGURES)/threads.json
	$(BIN)/python -m benches.growth --json $(FIGURES)/growth.json
	$(BIN)/python -m benches.table $(FIGURES)
	$(BIN)/python -m benches.fit_ranks
	$(BIN)/python -m benches.imports
	$(BIN)/python -m benches.peft_build
	$(BIN)/python -m benches.task_spectra
	$(BIN)/python -m benches.adapter_accuracy
	$(BIN)/python -m benches.gradients
	$(BIN)/python -m benches.schedules
	$(BIN)/python -m benches.methods

picture: $(VENV)/installed ## Draw the picture of the README.
	$(BIN)/python docs/pictures/ranks.py $$($(BIN)/python -m tests.support.material smollm2) \
		"SmolLM2-135M: a LoRA rank for every layer" docs/pictures/ranks.svg

lint: $(VENV)/installed ## Check format, lints, types and stubs.
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --features lorank/bench -- --deny warnings
	RUSTDOCFLAGS='--deny warnings' cargo doc --release --package lorank --no-deps
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell benches docs examples python rust tests *.md
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.13
	$(BIN)/python -m mypy.stubtest lorank._core

format: $(VENV)/installed ## Rewrite files in the house format.
	cargo fmt --all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove everything that the other verbs made.
	rm -rf $(VENV) target $(DEMO) $(FIGURES) $(COVERAGE) dist
