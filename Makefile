# All targets run in .venv, which is created on first use. Requires only make and Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-reliability test-gpu bench docs lint format wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is required; select it with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q -e '.[run,report]'
	@touch $@

.venv/.installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	@touch $@ .venv/.installed

run: .venv/.installed ## first run: 2-bit ResNet-20 on digits with OCTAV and max-scaling, and full precision, three seeds
	$(BIN)/qat-run -m model=resnet20 bits=32,2 clipping=octav,max seed=0,1,2
	$(BIN)/qat-report compare runs
	@echo "Open report/compare.html, the report of these runs, in a browser."

test: lint .venv/.installed-dev ## all checks: linting, types, tests, and the wheel
	$(BIN)/python -m pytest

test-slow: .venv/.installed-dev ## two batches of every row of every table, on small data and on a folder laid out like ImageNet
	$(BIN)/python -m pytest -m slow

test-reliability: .venv/.installed-dev ## killed runs, full disks, cluster failures, corrupted records
	$(BIN)/python -m pytest -m reliability -s -n 0

test-gpu: .venv/.installed-dev ## tests that need a GPU: kernels, steps without synchronization, graphs, compiled networks, whole runs, nccl
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "test-gpu: PyTorch found no CUDA device, so nothing was tested." >&2; exit 1; }
	$(BIN)/python -m pytest -m gpu -n 0 tests/gpu
	$(BIN)/python -m pytest -n 0 tests/quant/test_kernels.py tests/quant/test_triton.py

bench: .venv/.installed-dev ## measure the relative cost of quantization (20 minutes on two cores); results in bench/
	$(BIN)/python scripts/benchmark.py

docs: .venv/.installed-dev ## build the docs as a website in docs/_build/html
	$(BIN)/python -m sphinx -b html -W -n --keep-going -q docs docs/_build/html

lint: .venv/.installed-dev ## ruff, mypy, and the import order of packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/.installed-dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/.installed-dev ## build dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove .venv, caches and build results (not runs/)
	rm -rf .venv build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find qat_runner tests -name __pycache__ -prune -exec rm -rf {} +
