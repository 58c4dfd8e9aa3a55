# make demo         set up, fine-tune in five ways, evaluate old and new tasks in LIBERO, write runs/demo/report.md
# make demo-quick   the same stages at a tenth of the size or less: too small to judge by
# make test         set up, run all tests, JOBS (2) at a time
# make lint         style, complexity limits and types
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
export MUJOCO_GL ?= osmesa

.PHONY: demo demo-quick test lint setup clean

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

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements/constraints.txt requirements/install_renderer.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements/constraints.txt --editable '.[libero,dev]'
	bash requirements/install_renderer.sh $(BIN)/python
	touch $@

clean:
	rm -rf $(VENV) runs rollouts experiments/logs .pytest_cache .ruff_cache
