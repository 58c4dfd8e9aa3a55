# make demo   set up, fine-tune (plain and CRaFT), evaluate in LIBERO, write results/demo/report.md
# make test   set up, run all tests, JOBS (2) at a time
# make lint   style and complexity limits
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
export MUJOCO_GL ?= osmesa

.PHONY: demo test lint setup clean

demo: setup
	$(BIN)/python craft_experiments/00_demo/run_demo.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not alone"
	$(BIN)/python -m pytest -m alone

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements/constraints.txt requirements/install_renderer.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements/constraints.txt --editable '.[libero,dev]'
	bash requirements/install_renderer.sh $(BIN)/python
	touch $@

clean:
	rm -rf $(VENV) runs rollouts experiments/logs .pytest_cache .ruff_cache
