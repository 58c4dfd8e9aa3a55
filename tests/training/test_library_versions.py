"""Checkpoints written under one supported version of transformers, opened under the other, both ways.

Needs a second environment, whose Python is named by CRAFT_OTHER_PYTHON:

    python -m venv other && other/bin/pip install -e . 'transformers>=5,<6'
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLE = "CRAFT_OTHER_PYTHON"
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OTHER = os.environ.get(VARIABLE)
KINDS = {"start--1_chkpt", "lora--1_chkpt", "merged--1_chkpt", "published"}

pytestmark = pytest.mark.skipif(not OTHER, reason=f"{VARIABLE} names no Python of another environment")


def work(python: str, task: str, folder: Path) -> dict:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "HF_HUB_OFFLINE": "1"}
    command = [python, str(HERE / "library_worker.py"), task, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("direction", ["this to other", "other to this"])
def test_what_one_version_writes_the_other_reads_alike(tmp_path, direction):
    first, second = (sys.executable, OTHER) if direction == "this to other" else (OTHER, sys.executable)
    written, read = work(first, "write", tmp_path), work(second, "read", tmp_path)
    assert written["version"].split(".")[0] != read["version"].split(".")[0], f"{VARIABLE}: the same version"
    assert written["folders"].keys() == read["folders"].keys() == KINDS
    for name, expected in written["folders"].items():
        found = read["folders"][name]
        assert found["actions"] == pytest.approx(expected["actions"], abs=1e-5), name
        assert found["tokens"] == expected["tokens"], name
        assert found["tokens"][0] == found["tokens"][1], name
