# make demo         set up, fine-tune in five ways, evaluate old and new tasks in LIBERO, write runs/demo/report.md
# make demo-quick   the same stages at a tenth of the size or less: too small to judge by
# make test         set up, run all tests, JOBS (2) at a time
# make lint         style, complexity limits and types
# make docs         the documentation site, in build/site; look at it: python -m http.server --directory build/site
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
export MUJOCO_GL ?= osmesa

.PHONY: demo demo-quick test lint docs setup clean

demo: setup
	$(BIN)/python craft_experiments/00_demo/run_demo.py

demo-quick: setup
	$(BIN)/python craft_experiments/00_demo/run_demo.py --max_steps 80 --batch_size 8 --trials 1 --sentence_trials 1 \
		--work_dir runs/demo_quick

test: setup
	ended=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not alone" || ended=$$?; \
	$(BIN)/python -m pytest -m alone || ended=$$?; \
	exit $$ended

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup $(VENV)/.installed-docs
	$(BIN)/python examples/notebooks.py --output_dir build/notebooks
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements/constraints.txt requirements/install_renderer.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements/constraints.txt --editable '.[libero,dev]'
	bash requirements/install_renderer.sh $(BIN)/python
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint requirements/constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf build $(VENV) runs rollouts experiments/logs .pytest_cache .ruff_cache
