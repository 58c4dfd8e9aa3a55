"""The budget experiment: its cells are real training commands, and its page follows from the raw files alone."""

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest

from craft_experiments.common_utils.drift_runs import command, record_file
from prismatic.training.command_line import parse_flags

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "craft_experiments" / "04_budget"
RESULTS = ROOT / "results" / "budget"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"budget_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def driver():
    return load("run_budget")


@pytest.fixture(scope="module")
def pages():
    return load("make_report")


def test_cells_are_distinct_training_commands_with_their_budget(driver):
    cfg = driver.BudgetConfig()
    cells = driver.cells(cfg)
    assert len({record_file(cfg, cell) for cell in cells}) == len(cells) == 3 + 6 * 3 * len(driver.VARIANTS)
    for cell in cells:
        flags = parse_flags(command(cfg, cell)[1:])
        assert (flags.craft_retention_budget, flags.seed, flags.use_craft) == (cell.budget, cell.seed, True)
        # One unit of drift for all variants.
        assert flags.craft_retention_metric == "rel_mse"
        assert flags.craft_preset == cell.variant.split(",")[0]


def record(variant, budget, seed, drift, steps=8):
    return {
        "variant": variant, "budget": budget, "seed": seed, "measured_steps": list(range(steps)),
        "all_losses": [1.0] * (steps - 2) + [0.5, 0.5], "CRaFT/Retention Loss": [9.0] * (steps - 2) + [drift, drift],
        "CRaFT/Lambda": [0.0] * steps, "CRaFT/Gate Open": [0.0, 1.0] * (steps // 2),
        "CRaFT/Conflict Ratio": [None] * steps,
    }  # fmt: skip


def test_the_page_averages_the_last_quarter_and_takes_medians_over_seeds(pages, tmp_path):
    (tmp_path / "runs").mkdir()
    drifts = {0: 0.011, 1: 0.012, 2: 0.005}
    records = [record("budget", 0.01, seed, drift) for seed, drift in drifts.items()]
    for i, run in enumerate([*records, record("budget", None, 0, 0.3)]):
        (tmp_path / "runs" / f"{i}.json").write_text(json.dumps(run))
    runs = pages.load_runs(tmp_path)
    assert sorted(run["achieved"] for run in runs) == pytest.approx([0.005, 0.011, 0.012, 0.3])
    text = pages.report(runs)
    # Deviations 10 %, 20 % and 50 %: the median is that of the second.
    assert "median over all 3 runs 20.0%, largest median of a budget 20.0%" in text
    assert "| 0.01 | 3 | 0.011 (0.005 to 0.012) | 20.0% | 2 of 3 | 0.5 (0.5 to 0.5) |" in text
    assert "Without a constraint it is 0.3 (0.3 to 0.3) (1 seeds)" in text


def test_no_runs_is_an_error_that_names_the_folder(pages, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run has been recorded"):
        pages.load_runs(tmp_path)


@pytest.mark.skipif(not RESULTS.exists(), reason="results/budget is not there")
def test_the_committed_page_follows_from_the_raw_files(pages):
    assert (RESULTS / "budget.md").read_text() == pages.report(pages.load_runs(RESULTS))


@pytest.mark.skipif(not RESULTS.exists(), reason="results/budget is not there")
def test_the_recorded_commands_are_those_of_the_driver(driver, pages):
    recorded = {tuple(shlex.split(run["command"])) for run in pages.load_runs(RESULTS)}
    cfg = driver.BudgetConfig()
    planned = {tuple(["python", *command(cfg, cell)]): cell.variant for cell in driver.cells(cfg)}
    assert recorded <= planned.keys()
    # The cheaper variants were run in part; the page says how many runs a row rests on.
    assert {words for words, variant in planned.items() if variant in ("budget", "original")} <= recorded
