"""A table whose driver is killed again and again ends as the undisturbed one, and no job runs twice at a time."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stub_programs

REPO = Path(__file__).parents[2]
DRIVER = REPO / "craft_experiments" / "01_main_results" / "run_table1_experiments.sh"
KILLS = 10
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


class Run:
    """One table in a folder of its own."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        folder.mkdir()
        self.folder = folder
        self.environment = stub_programs.clean_environment() | {
            "RUN_ROOT_DIR": str(folder / "work"),
            "RESULTS_DIR": str(folder / "out"),
        }
        self.environment |= variables

    def start(self, **variables: str) -> subprocess.Popen:
        with (self.folder / "console").open("ab") as console:
            return subprocess.Popen(
                ["bash", str(DRIVER)], env=self.environment | variables, cwd=self.folder,
                stdout=console, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finish(self) -> None:
        """Run to the end."""
        code = self.start().wait()
        assert code == 0, (self.folder / "console").read_text()[-3000:]

    def lines(self) -> int:
        """How many lines the driver and its programs have printed."""
        console = self.folder / "console"
        return console.read_bytes().count(b"\n") if console.exists() else 0

    def outcome(self) -> dict[str, object]:
        """Tables, states and records, without seconds, memory and the names of the folders."""
        names = ("table1_results*.log", "table1_formatted*.md", "table1.csv", "table1_pairs.csv")
        found = {path.name: path.read_text() for name in names for path in (self.folder / "out").glob(name)}
        records = self.folder / "work" / "tiny-archive" / "records"
        found["manifest"] = json.loads((records / "manifest.json").read_text())
        for path in records.glob("*/*.json.gz"):
            text = gzip.decompress(path.read_bytes()).decode().replace(str(self.folder), "FOLDER")
            record = json.loads(text)
            assert record.pop("seconds") >= 0 <= record.pop("processor_seconds")  # a stand-in may round to 0
            record.get("metrics", {}).pop("Memory/Peak GiB", None)
            found[str(path.relative_to(records))] = record
        return found

    def leftovers(self) -> list[Path]:
        """Files that only exist while a record or a table is written."""
        return [path for path in self.folder.rglob("*.tmp") if "records" in path.parts or "out" in path.parts]


def kill(process: subprocess.Popen, whole_group: bool) -> None:
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)  # of a group whose leader ended, and was not waited for, as well
    else:
        process.kill()
    process.wait()


def wait_for(condition, process: subprocess.Popen, seconds: float = 1800) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("slots", ["1", "2"])
def test_ten_kills_leave_no_trace(tmp_path, slots):
    rng = random.Random(int(slots))
    variables = stub_programs.install(tmp_path) | {
        "PRESET": "tiny-archive", "SUITES": "libero_goal libero_object", "SEEDS": "0", "MAX_STEPS": "8",
        "SAVE_FREQ": "2",
        "NUM_TRIALS": "3", "SLOTS": slots, "STUB_HASHED": "1", "STUB_SLEEP": "0.01",
    }  # fmt: skip
    runs = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        own = {"RUN_ROOT_DIR": "work", "RESULTS_DIR": "out", "DATA_ROOT_DIR": "data", "STUB_CALLS": "calls"}
        runs[name] = Run(folder, variables | {key: str(folder / value) for key, value in own.items()})
    runs["whole"].finish()
    killed, calls = runs["killed"], tmp_path / "killed" / "calls"
    started = lambda: calls.read_text().count("\n") if calls.exists() else 0  # noqa: E731
    groups, gate = [True, False] * (KILLS // 2), tmp_path / "gate"
    rng.shuffle(groups)
    for whole_group in groups:
        # Left alone, a program that prints dies of its broken pipe; a quiet one goes on and outlives the next start.
        quiet = {} if whole_group else {"STUB_QUIET": "1", "STUB_SLEEP": "0.6"}
        target = started() + rng.randint(0 if whole_group else 1, 2)
        gate.write_text(str(target))  # so that the run cannot end before it is killed
        process = killed.start(**quiet, STUB_GATE=str(gate))
        wait_for(lambda wanted=target: started() >= wanted, process)
        time.sleep(rng.uniform(0, 0.15))
        kill(process, whole_group)
    gate.unlink()
    killed.finish()
    assert not (tmp_path / "violations").exists(), (tmp_path / "violations").read_text()
    assert killed.outcome() == runs["whole"].outcome()
    assert len(killed.outcome()) == 2 * 2 + 2 + 1 + 6 + 20  # lists, tables, manifest, trainings, evaluations
    assert killed.leftovers() == []
    whole_calls = (tmp_path / "whole" / "calls").read_text().splitlines()
    assert 2 + 6 + 20 == len(whole_calls) < started()


@pytest.mark.slow
@pytest.mark.simulator
def test_kills_of_real_programs(tmp_path):
    """Training and simulator as they are, at the smallest scale there is; few kills, as each costs a start."""
    rng = random.Random(3)
    variables = {
        "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MUJOCO_GL": "osmesa",
        "PRESET": "tiny-archive", "METHODS": "craft", "CONTROLS": "False", "SUITES": "libero_spatial", "TASK_IDS": "9",
        "SEEDS": "0", "CONFIG_FILE_PATH": "pretrained_models/tiny-libero-object", "DATA_ROOT_DIR": "datasets/rlds",
        "DATASET_SUFFIX": "_scripted_no_noops", "COLLECT_DEMOS": "False", "MAX_STEPS": "6", "SAVE_FREQ": "2",
        "BATCH_SIZE": "2", "NUM_TRIALS": "1", "NUM_WORKERS": "0",
    }  # fmt: skip
    whole, killed = Run(tmp_path / "whole", variables), Run(tmp_path / "killed", variables)
    whole.finish()
    # Not all of work: its folders come and go meanwhile.
    folder = tmp_path / "killed" / "work" / "tiny-archive" / "records"
    records = lambda: len(list(folder.glob("*/*.json.gz")))  # noqa: E731
    # A moment is a number of lines that the programs print: few of them fall into the first job that is missing, and
    # None lets that job end, so that later ones are killed as well.
    moments = [rng.randint(1, 8), None, None]
    groups = [True, False, True]
    rng.shuffle(moments)
    rng.shuffle(groups)
    done = []
    for moment, whole_group in zip(moments, groups, strict=True):
        lines, before = killed.lines(), records()
        process = killed.start()
        while process.poll() is None and not (
            killed.lines() >= lines + moment if moment else records() > before or before == 2
        ):
            time.sleep(0.002)
        if process.poll() is not None:  # the rest was over before this process had its turn
            assert process.returncode == 0
            break
        kill(process, whole_group)
        done.append(records())
    killed.finish()
    print(f"records at each kill {done}")
    assert done and killed.outcome() == whole.outcome()
    assert {"table1_results.log", "table1_formatted.md", "table1.csv", "manifest"} <= killed.outcome().keys()
    assert records() == 1 + 2
    assert killed.leftovers() == []
