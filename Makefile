# One verb for each thing that a person wants. The environment is made on first use.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := build-demo
FIGURES := build-bench
COVERAGE := build-coverage
LOWEST := .venv-lowest
WITHOUT_TORCH := tests/core tests/internal tests/task_spectra \
	tests/analysis/test_journals.py tests/analysis/test_memory_limits.py tests/cli/test_streams.py \
	tests/report/test_files.py tests/report/test_foreign_names.py tests/report/test_pickles.py
# Tests of every part that uses torch, transformers and PEFT.
WITH_TORCH := tests/allocation tests/training tests/modules/test_roles.py tests/modules/test_skeleton.py \
	tests/analysis/test_spectra.py tests/sources/test_files.py tests/sources/test_live.py \
	tests/adapters/test_reading.py tests/adapters/test_writing.py tests/adapters/test_live_models.py \
	tests/adapters/test_certificates.py tests/adapters/test_profiles.py tests/adapters/test_adalora.py \
	tests/compression/test_selection.py tests/compression/test_merging.py tests/profiling/test_gradients.py
FUZZ_TARGETS := header gguf shard_index view spectrum low_rank statistics selection writer
SECONDS ?= 60

RUST_SOURCES := $(shell find rust -name '*.rs' -o -name Cargo.toml)

.PHONY: help demo test test-rust test-python test-lowest coverage sweep fuzz soak bench picture lint format clean

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

test-lowest: ## Run a selection of tests with the lowest supported dependencies and CPython 3.10.
	python3.10 -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade pip
	$(LOWEST)/bin/pip install --quiet --constraint tests/lowest.txt '.[peft,report]' \
		hypothesis markdown-it-py ml_dtypes pytest pytest-xdist pyyaml safetensors scikit-learn scipy
	OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest --numprocesses 2 --dist worksteal $(WITHOUT_TORCH) $(WITH_TORCH)

coverage: $(VENV)/installed ## Run the Python tests with branch coverage (14 minutes); see build-coverage.
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal --cov --cov-report term --cov-report html:$(COVERAGE)

sweep: $(VENV)/installed ## Allocate for and extract from every architecture of transformers (about 3 minutes).
	$(BIN)/pytest -m slow -s

fuzz: $(VENV)/installed ## Fuzz each target for SECONDS seconds (default 60); needs Rust nightly and cargo-fuzz.
	for target in $(FUZZ_TARGETS); do mkdir -p fuzz/corpus/$$target && \
		cargo +nightly fuzz run $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
		-max_total_time=$(SECONDS) -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 || exit 1; done
	$(BIN)/python -m fuzz.files $(SECONDS)

soak: $(VENV)/installed ## Call, kill, fill the disk, run threads and forks, again and again.
	$(BIN)/python -m tests.soak

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
	rm -rf $(VENV) $(LOWEST) target fuzz/target fuzz/corpus fuzz/artifacts $(DEMO) $(FIGURES) $(COVERAGE) dist
