"""Two real processes (gloo) train like one: same weights on both ranks, equal to one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, processes: int, batch_size: int, accumulation: int, data_root: Path) -> list[dict]:
    folder.mkdir()
    arguments = [str(WORKER), str(folder), str(data_root), str(batch_size), str(accumulation)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_equal_one_with_craft_and_accumulation(tmp_path):
    data_root = ROOT / "tests" / "golden" / "rlds_mini"
    first, second = run(tmp_path / "two", 2, 2, 2, data_root)
    (single,) = run(tmp_path / "one", 1, 4, 2, data_root)
    assert first["lambda"] == second["lambda"]
    for name, value in first["weights"].items():
        # Every part, the action head included: a head called past its wrapper would differ between the ranks.
        assert torch.equal(value, second["weights"][name]), name
        torch.testing.assert_close(
            value, single["weights"][name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n} {m}"
        )
    assert first["lambda"] == pytest.approx(single["lambda"], rel=1e-6)
