# SPDX-License-Identifier: Apache-2.0
# Every target that needs Python first brings .venv up to date; when nothing changed that takes a tenth of a second.

.DEFAULT_GOAL := help
.PHONY: help setup mlir demo test fuzz compat kernels-report lint layout clean

# The first Python 3.11 or newer on this machine; `make PYTHON=/path/to/python …` overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
BIN := $(CURDIR)/.venv/bin
LM := examples/tiny_lm
WORKERS ?= 2

# Nothing downloads: models and data are in the repository.
export HF_HUB_OFFLINE := 1

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

setup:  ## bring .venv to what constraints.txt pins
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; install one or run: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) scripts/environment.py test

mlir: setup  ## add the optional MLIR back end to .venv
	@$(PYTHON) scripts/environment.py mlir

demo: setup  ## the main job: rewrite, evaluate and export the embedded language model
	@mkdir -p out
	OMP_WAIT_POLICY=passive $(BIN)/rewriter optimize $(LM) --passes fuse,shift_add:embeddings=true,vq_logits \
		--calibration $(LM)/calibration.safetensors --evaluate $(LM)/held_out.safetensors --onnx out/tiny_lm.onnx

test: setup  ## the whole suite (ARGS="-k name" narrows it)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(ARGS)

fuzz: setup  ## 100 000 examples of the matcher (writes docs/fuzz.md), then every property test with many more
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m hypothesis --hypothesis-profile=fuzz $(ARGS)

compat: setup  ## smoke test in throw-away environments, oldest to newest; writes docs/compat.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/compat/run.py $(ARGS)

kernels-report: setup  ## compile every kernel for four GPUs: registers, shared memory, spills (ARGS=name narrows it)
	$(BIN)/python scripts/kernels_report.py $(ARGS)

lint: setup layout  ## ruff and mypy
	$(BIN)/ruff check .
	cd build/layout && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p rewriter

# The four source folders under the one name they are imported by, as links, for tools that do not read the package map.
layout:
	@rm -rf build/layout && mkdir -p build/layout/rewriter
	@ln -s $(filter-out %/__pycache__,$(wildcard $(CURDIR)/rewriter/*)) $(CURDIR)/passes $(CURDIR)/codegen $(CURDIR)/kernels build/layout/rewriter/

clean:  ## remove what the targets made, .venv too
	rm -rf .venv build out dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
