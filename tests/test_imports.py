"""Importing any module is silent and does nothing: no output, no network, no command line, no files."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import builtins, importlib, pkgutil, socket, sys
sys.argv = ["finetune.py", "--dataset_name", "aloha_bridge_calvin"]

def refuse(*args, **kwargs):
    raise AssertionError("an import opened a socket")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
import prismatic, experiments, craft_experiments
for package in (prismatic, experiments, craft_experiments):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
heavy = {"mujoco", "robosuite", "libero", "wandb", "tensorflow", "timm", "torchvision"} & set(sys.modules)
assert not heavy, f"imported at import time: {heavy}"
from prismatic.vla.action_spec import ActionSpec
assert ActionSpec() == ActionSpec(chunk_len=8, action_dim=7, proprio_dim=8)
"""


@pytest.mark.slow
def test_importing_everything_is_silent_and_offline(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_constraint_imports_nothing_beyond_torch(tmp_path):
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "import prismatic.craft\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new <= {'prismatic', 'torch'}, new\n"
        "rooms = {'.'.join(name.split('.')[:2]) for name in sys.modules if name.startswith('prismatic.')}\n"
        "assert rooms == {'prismatic.craft'}, rooms\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
