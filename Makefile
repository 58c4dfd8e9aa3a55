PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
export MUJOCO_GL ?= osmesa

# What stands behind ## is what `make help` lists, and what a target says before it begins.
SAY = @awk -F ' *\#\# *' '/^$@:/ { print "make $@: " $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: help demo demo-quick test lint docs setup clean

help: ## list the targets
	@awk -F ' *:.*## *' '/^[a-z-]+:.*##/ { printf "make %-12s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: setup ## fine-tune a small VLA in five ways, evaluate old and new tasks in LIBERO, write runs/demo/report.md
	$(SAY)
	@$(BIN)/python craft_experiments/00_demo/run_demo.py

demo-quick: setup ## the stages of the demo at a tenth of the size or less: too small to judge by
	$(SAY)
	@$(BIN)/python craft_experiments/00_demo/run_demo.py --max_steps 80 --batch_size 8 --trials 1 --sentence_trials 1 \
		--work_dir runs/demo_quick

test: setup ## run all tests, JOBS (2) at a time
	$(SAY)
	@ended=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not alone" || ended=$$?; \
	$(BIN)/python -m pytest -m alone || ended=$$?; \
	exit $$ended

lint: setup ## check style, complexity limits and types
	$(SAY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup $(VENV)/.installed-docs ## build the documentation site in build/site
	$(SAY)
	@$(BIN)/python examples/notebooks.py --output_dir build/notebooks
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "look at it: python -m http.server --directory build/site"

setup: $(VENV)/.installed ## make VENV (.venv) with known-good versions, and the library that the simulator renders with

$(VENV)/.installed: pyproject.toml requirements/constraints.txt requirements/install_renderer.sh
	@echo "make setup, 1 of 3: a Python environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "make setup, 2 of 3: packages, 4 GB: two minutes or more"
	@$(BIN)/pip install --disable-pip-version-check --constraint requirements/constraints.txt \
		--editable '.[libero,dev]'
	@echo "make setup, 3 of 3: the library that the simulator renders with"
	@bash requirements/install_renderer.sh $(BIN)/python
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "make docs: its packages"
	@$(BIN)/pip install --disable-pip-version-check --constraint requirements/constraints.txt --editable '.[docs]'
	@touch $@

clean: ## delete VENV, runs, videos, evaluation logs and caches
	$(SAY)
	rm -rf $(VENV) build runs rollouts experiments/logs .pytest_cache .ruff_cache
