"""`make test` runs all its parts, whatever becomes of one, and tells when one failed."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("failing", ["not alone", "alone", "neither"])
def test_one_failing_part_does_not_keep_the_other_from_running(tmp_path, failing):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >> {tmp_path}/ran\n[ "$last" != "{failing}" ]\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    done = subprocess.run(["make", "-C", str(ROOT), "test", f"VENV={tmp_path}"], capture_output=True, text=True)
    assert (tmp_path / "ran").read_text().splitlines() == ["not alone", "alone"], done.stderr
    assert (done.returncode == 0) == (failing == "neither")
