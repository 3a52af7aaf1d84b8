# coterie. `make` alone lists the targets. PYTHON chooses the interpreter that .venv is made from.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
DEMO   ?= build/demo

py    := $(VENV)/bin/python
stamp := $(VENV)/.installed

# Tests and builds run one thread a process: threads of several processes would only contend for the same cores.
single := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo demo-full test test-all lint types format docs bench bench-full bench-paths bench-native bench-gpu bench-merging bench-library bench-arrow bench-routers bench-sweeps bench-suites bench-smear bench-learned bench-memory bench-fusionbench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(stamp) ## create the environment (.venv) with everything that demo and tests need

$(stamp): pyproject.toml constraints.txt
	@test -x $(py) || { echo "creating $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "installing coterie and what it needs into $(VENV) (a few minutes the first time) ..."
	@$(py) -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(stamp) ## the main job: eight experts, one mixture, one table
	@$(py) -m coterie demo -o $(DEMO)

demo-full: $(stamp) ## the same from full fine-tunes and LoRA adapters trained here (resumable)
	@$(py) -m coterie demo --full -o $(DEMO)-full

test: $(stamp) ## the default tests
	@$(single) HF_HUB_OFFLINE=1 $(py) -m pytest -q -n $(JOBS)

test-all: $(stamp) ## every test, the slow ones included
	@$(single) HF_HUB_OFFLINE=1 $(py) -m pytest -q -n $(JOBS) -m ""

lint: $(stamp) ## ruff: rules and format
	@$(py) -m ruff check --quiet --no-cache .
	@$(py) -m ruff format --quiet --check .

format: $(stamp) ## let ruff mend what it can
	@$(py) -m ruff check --quiet --fix .
	@$(py) -m ruff format --quiet .

types: $(stamp) ## mypy
	@$(py) -m mypy --no-error-summary

docs: $(stamp) ## the documentation's site, into build/site; every link is checked
	@NO_MKDOCS_2_WARNING=1 $(py) -m mkdocs build --quiet --strict --site-dir build/site

bench: $(stamp) ## what running and building a mixture costs, into docs/speed.md (under 20 minutes)
	@$(py) benchmarks/running.py
	@$(py) benchmarks/factorise.py
	@$(py) benchmarks/building.py
	@$(py) benchmarks/page.py

bench-full: $(stamp) ## the whole grid of layers; hours, and goes on where it was stopped
	@$(py) benchmarks/running.py --full
	@$(py) benchmarks/page.py

bench-paths: $(stamp) ## where one compute path overtakes the other, and the prices of the cost rule
	@$(py) benchmarks/paths.py

bench-native: $(stamp) ## the compiled path beside the others, and torch.compile (needs a C++ compiler)
	@$(py) benchmarks/native.py
	@$(py) benchmarks/page.py

bench-gpu: $(stamp) ## Llama-7B-shaped layers on a GPU, where torch has one, into docs/speed.md
	@$(py) benchmarks/gpu.py
	@$(py) benchmarks/page.py

bench-merging: $(stamp) ## merging and extracting against mergekit, in an environment of its own
	@$(py) benchmarks/merging.py

bench-library: $(stamp) ## a library of up to a thousand adapters; retrieval among up to 100,000 vectors
	@$(py) benchmarks/library.py

bench-arrow: $(stamp) ## routing by Arrow against PEFT's
	@$(single) $(py) benchmarks/arrow.py

bench-routers: $(stamp) ## every router over a drawer of adapters, into docs/routers.md (about two hours; goes on where it was stopped)
	@$(py) benchmarks/library_routers.py
	@$(py) benchmarks/library_routers_page.py

bench-sweeps: $(stamp) ## SMILE's parameters, and decay with more experts, into docs/sweeps.md (about three hours; goes on where it was stopped)
	@$(py) benchmarks/sweeps.py
	@$(py) benchmarks/sweeps_page.py

bench-suites: $(stamp) ## every suite's gates, and the headline methods on it, into docs/suites.md (hours; goes on where it was stopped)
	@$(py) benchmarks/suites.py
	@$(py) benchmarks/suites_page.py

bench-smear: $(stamp) ## learned routers side by side, into docs/smear.md (about two hours; goes on where it was stopped)
	@$(py) benchmarks/domains.py
	@$(py) benchmarks/tasks.py
	@$(py) benchmarks/routers_page.py

bench-learned: $(stamp) ## what learned routers cost: a layer, whole models, training steps, X-LoRA
	@$(single) $(py) benchmarks/learned.py
	@$(py) benchmarks/routers_page.py

bench-memory: $(stamp) ## peak memory of a build against depth and width
	@$(single) $(py) benchmarks/memory.py

bench-fusionbench: $(stamp) ## the same modules through fusion-bench, in an environment of its own
	@$(single) $(py) benchmarks/fusionbench.py

clean: ## remove build products and caches (not the environment)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
