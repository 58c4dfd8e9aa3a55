"""Every program: `--help` needs neither torch nor the simulator, and a mistake is one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "experiments/robot/libero/run_libero_eval.py": ["--pretrained_checkpoint", "no/such"],
    "experiments.robot.libero.collect_demos": ["--task_suite_name", "libero_object"],
    "experiments.robot.libero.compare_evals": ["no", "such"],
    "experiments.robot.libero.make_report": ["no/such"],
    "experiments.robot.libero.merge_shards": ["no/such", "--output", "out"],
    "experiments.robot.libero.suites": ["libero_object"],
    "experiments.robot.doctor": ["--data", "no/such"],
    "experiments.robot.doctor.render_reference": ["now"],
    "experiments.robot.serve_vla_eval": [],
    "prismatic.vla.datasets.inspect": ["no/such"],
}
"""Program -> a command line that cannot be used."""

# Blocked: what `--help` must do without. The programs run as they would from a shell.
RUN = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv[0] = PROGRAM
if PROGRAM.endswith(".py"):
    runpy.run_path(PROGRAM, run_name="__main__")
else:
    runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)
"""
SIMULATOR = {"mujoco", "robosuite", "libero", "bddl", "imageio_ffmpeg", "OpenGL"}


def run(program: str, words: list[str], blocked: set[str], folder: Path) -> subprocess.CompletedProcess:
    code = f"BLOCKED, PROGRAM = {blocked!r}, {str(ROOT / program) if program.endswith('.py') else program!r}\n{RUN}"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT)},
    )


def test_every_program_is_listed():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "experiments").rglob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    listed = {name if name.endswith(".py") else name.replace(".", "/") + ".py" for name in PROGRAMS}
    assert found == {name.replace("doctor.py", "doctor/__main__.py") for name in listed if name.startswith("exp")}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_neither_torch_nor_the_simulator(program, tmp_path):
    done = run(program, ["--help"], SIMULATOR | {"torch", "transformers", "vla_eval"}, tmp_path)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout) > 50
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mistake_is_one_line_and_code_2(program, tmp_path):
    commands = [PROGRAMS[program]]
    commands += [[*PROGRAMS[program], "--no_such_flag", "1"]] if program != "experiments.robot.serve_vla_eval" else []
    for words in commands:
        done = run(program, words, SIMULATOR | {"vla_eval"}, tmp_path)
        assert done.returncode == 2 and done.stdout == "", done.stderr
        assert done.stderr.count("\n") == 1 and "error: " in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []
