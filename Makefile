# make demo · make test · make study · make lint · make gate · make bench: each does its own set-up in .venv.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   ?= demo
STUDY  ?= study
# The Triton that the GPU machines have: the gate compiles with it beside the installed one.
GPU_TRITON := $(VENV)/triton-3.6.0
JOBS   ?= 2

.PHONY: demo study test lint gate bench venv clean
.DEFAULT_GOAL := test

venv: $(STAMP)

# torch first and pinned: a bare resolve would fetch several gigabytes of CUDA wheels.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: venv
	$(BIN)/reelforge demo --out $(DEMO)

# Two workers with one thread each: the tests are many and small.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=.links $(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/house.py

$(GPU_TRITON): | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target $@ triton==3.6.0

# Registers, spills and instructions of every kernel for sm_90a against bench/records/gate; needs no GPU.
gate: venv $(GPU_TRITON)
	$(BIN)/reelforge bench gate

# The whole pipeline under three seeds and every ablation: an hour and a half; the same command goes on where it stopped.
study: venv
	$(BIN)/reelforge bench study --out $(STUDY)

bench: venv
	$(BIN)/python -m pytest bench -q --benchmark-sort=name --benchmark-columns=min,median,rounds

clean:
	rm -rf $(VENV) build demo
