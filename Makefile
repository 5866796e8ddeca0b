# setup: the environment. demo: train on drawn scenes and draw the picture. test, check: what a change must pass.
# bench: the benchmarks. `make setup PYTHON=python3.12` takes another Python, 3.10 or newer.
PYTHON ?= python3
BIN := .venv/bin
# Spelt out, since `accelerate launch` otherwise warns of its defaults and leaves one CPU thread to the process.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)

.PHONY: setup demo test check bench

setup: .venv/.installed

demo: setup
	$(LAUNCH) training/train.py --resume
	$(BIN)/python -m granalign_hf.training.demo runs/demo-scenes

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist loadfile

check: .venv/.installed-dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: setup
	$(BIN)/python tests/benchmarks/similarity.py
	$(BIN)/python tests/benchmarks/data.py
	$(BIN)/python tests/benchmarks/retrieval.py

# A stamp is touched only after all was installed, so that an interrupted run is taken up again.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@
