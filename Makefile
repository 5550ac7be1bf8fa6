# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment, the dependencies, the compiled kernels.
PYTHON ?= python3
VENV ?= .venv
# One known version, so that a fresh machine gets what was tested; the package itself accepts a range (pyproject.toml).
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint format clean

help: ## Show what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY) ## Make the virtual environment and build the package in it

# An isolated build would fetch a second torch. Editable, so that changed Python needs no new build; changed C++ does.
$(READY): pyproject.toml setup.py Makefile $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/include/recontrol/*.h csrc/cuda/*.cu)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" "pybind11>=2.13" "ninja>=1.11" numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev,demo]"
	touch $(READY)

demo: $(READY) ## Run the whole method on the embedded model: collect, train, choose, decode, report
	$(BIN)/python examples/movie_reviews/demo.py --out out/demo

# Test processes side by side; whichever is done takes tests from the other.
WORKERS ?= 2

test: $(READY) ## Run all tests, ruff and mypy
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --durations 15

bench: $(READY) ## Measure against the baselines; rows go to benchmarks/data, ratios are printed
	$(BIN)/python -m pytest benchmarks

lint: $(READY) ## Run ruff and mypy
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix && $(BIN)/ruff format

clean: ## Remove what was built, but not results
	rm -rf $(VENV) build dist *.egg-info recontrol/*.so .pytest_cache .mypy_cache .ruff_cache
