"""Programs that simulate compute with the same kernels on every processor."""

import ctypes
import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from craft_experiments import runner
from craft_experiments.jobs.collect import Collect
from craft_experiments.preset import Demonstrations
from experiments.robot.libero import collect_workers
from experiments.robot.libero.collect_settings import CollectSettings
from experiments.robot.libero.collect_workers import Share

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="about numpy's wheel for Linux"
)
VARIABLE = "OPENBLAS_CORETYPE"


def kernels_in_use() -> str:
    """Name of the processor that numpy's OpenBLAS computes for in this process."""
    (library,) = (Path(np.__file__).parents[1] / "numpy.libs").glob("*openblas*")
    name = ctypes.CDLL(str(library)).scipy_openblas_get_corename64_
    name.restype = ctypes.c_char_p
    return name().decode()


def note_kernels(settings: CollectSettings, share: Share, tell) -> None:
    """In place of `collect_share`."""
    Path(settings.output_dir, f"task{share.task_id}").write_text(kernels_in_use())


@pytest.fixture(params=["", "Sandybridge"])
def expected(request, monkeypatch):
    """Kernels that a program is to use: by default those for AVX2, else what the user set."""
    monkeypatch.setenv(VARIABLE, request.param)  # so that it is as before in the end, whoever changes it
    if not request.param:
        monkeypatch.delenv(VARIABLE)
    return request.param or "Haswell"


def test_collecting_processes(monkeypatch, tmp_path, expected):
    monkeypatch.setattr(collect_workers, "collect_share", note_kernels)
    before = dict(os.environ)
    collect_workers.run_processes(CollectSettings("libero_object", (0, 3), str(tmp_path), "d"))
    assert os.environ == before
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"task0": expected, "task3": expected}


def test_programs_of_the_tables(tmp_path, expected):
    job = Collect(Demonstrations("libero_object", "", "d"))
    settings = SimpleNamespace(logs_dir=tmp_path, slots=1)
    with (tmp_path / "lock").open("w") as lock:
        runner._run(settings, job, [sys.executable, __file__], lock.fileno())
    assert job.log(settings).read_text().endswith(f"uses {expected}\n")


if __name__ == "__main__":
    print("uses", kernels_in_use())
