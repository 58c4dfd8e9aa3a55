"""The Snakemake workflow, with stand-ins for the programs: the same files as the built-in runner, failures kept apart.

Snakemake is no dependency of the tests. In an environment that has snakemake, pytest and hypothesis, no torch:

    PYTHONPATH=. python -m pytest --noconftest tests/experiments/test_workflow.py
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stub_programs

pytest.importorskip("snakemake", reason="needs snakemake (pip install .[workflow])")
REPO = Path(__file__).parents[2]
SNAKEFILE = REPO / "craft_experiments" / "workflow" / "Snakefile"
SETTINGS = {
    "preset": "tiny-archive", "suites": "libero_goal libero_10", "seeds": "0", "methods": "plain craft",
    "controls": "False", "max_steps": "8", "save_freq": "2", "num_trials": "4", "learning_rate": "5e-4",
}  # fmt: skip
pytestmark = pytest.mark.slow


class Table:
    """One table in a folder of its own, made by either engine."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, variables = folder, stub_programs.install(folder)
        own = {"python": variables["PYTHON"], "data_root_dir": str(folder / "data")}
        own |= {"work_dir": variables["RUN_ROOT_DIR"], "results_dir": variables["RESULTS_DIR"]}
        self.settings, self.environment = SETTINGS | own, os.environ | variables | {"PYTHONPATH": str(REPO)}
        self.seen = 0

    def _run(self, command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess:
        environment = self.environment | variables
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=1800)

    def snakemake(self, *words: str, **variables: str) -> subprocess.CompletedProcess:
        config = ["table=table1", *(f"{name}={value}" for name, value in self.settings.items())]
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "--cores", "2"]
        return self._run([*command, *words, "--config", *config], variables)

    def built_in(self) -> subprocess.CompletedProcess:
        flags = [f"--{name}={value}" for name, value in self.settings.items()]
        return self._run([sys.executable, "-m", "craft_experiments", "run", "table1", *flags], {})

    def new_calls(self) -> int:
        lines = (self.folder / "calls").read_text().splitlines()
        new, self.seen = len(lines) - self.seen, len(lines)
        return new

    @property
    def records(self) -> Path:
        return self.folder / "work" / "tiny-archive" / "records"

    def manifest(self) -> dict:
        return json.loads((self.records / "manifest.json").read_text())

    def outcome(self) -> dict[str, object]:
        found = {path.name: path.read_text() for path in (self.folder / "out").glob("table1_[!m]*")}
        for path in self.records.glob("*/*.json.gz"):
            text = gzip.decompress(path.read_bytes()).decode().replace(str(self.folder), "FOLDER")
            found[str(path.relative_to(self.records))] = json.loads(text) | {"seconds": 0, "processor_seconds": 0}
        return found | {"manifest": self.manifest()}


def test_both_engines_make_the_same_files_and_take_over_from_each_other(tmp_path):
    one, two = Table(tmp_path / "one"), Table(tmp_path / "two")
    done = one.snakemake()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert one.new_calls() == 2 + 4 + 8
    assert two.built_in().returncode == 0
    assert one.outcome() == two.outcome() and set(one.manifest()) == set(two.manifest())
    assert {state["state"] for state in one.manifest().values()} == {"evaluated"}
    assert two.snakemake().returncode == 0 and one.built_in().returncode == 0
    assert one.new_calls() == 0 and two.new_calls() == 2 + 4 + 8
    (one.records / "plain--goal--seed0" / "standard@libero_goal.json.gz").unlink()
    assert one.snakemake().returncode == 0 and one.new_calls() == 1
    assert one.outcome() == two.outcome()


def test_a_failing_job_stops_nothing_but_what_waits_for_it(tmp_path):
    table = Table(tmp_path / "table")
    done = table.snakemake(STUB_TRAIN_FAILS="libero_goal", STUB_EVAL_FAILS="libero_10")
    assert done.returncode != 0 and table.new_calls() == 2 + 4 + 4
    codes = {name: state.get("code") for name, state in table.manifest().items()}
    training = {f"{method}--goal--seed0": "TRAINING_FAILED" for method in ("plain", "craft")}
    assert codes == training | {f"{method}--10--seed0": "EVAL_FAILED" for method in ("plain", "craft")}
    expected = "libero_goal: TRAINING_FAILED\nlibero_10: EVAL_FAILED\n"
    assert (table.folder / "out" / "table1_results.log").read_text() == expected
    done = table.snakemake(STUB_COLLECT_FAILS="libero_10")  # its demonstrations are there
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {state["state"] for state in table.manifest().values()} == {"evaluated"}
    expected = "libero_goal: 0.7500\nlibero_10: 0.7500\n"
    assert (table.folder / "out" / "table1_results.log").read_text() == expected


def test_a_failing_collection_is_noted_for_every_cell_that_waits_for_it(tmp_path):
    table = Table(tmp_path / "table")
    assert table.snakemake(STUB_COLLECT_FAILS="libero_10").returncode != 0
    codes = {name: state.get("code") for name, state in table.manifest().items()}
    assert codes["plain--10--seed0"] == codes["craft--10--seed0"] == "TRAINING_FAILED"
    assert codes["plain--goal--seed0"] is codes["craft--goal--seed0"] is None


def test_other_settings_are_refused_before_anything_runs(tmp_path):
    table = Table(tmp_path / "table")
    assert table.snakemake().returncode == 0
    table.new_calls()
    table.settings["learning_rate"] = "1e-3"
    done = table.snakemake()
    assert done.returncode != 0 and "--learning_rate 0.0005 (now 0.001)" in done.stdout + done.stderr
    assert table.new_calls() == 0
