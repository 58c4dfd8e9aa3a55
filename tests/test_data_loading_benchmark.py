"""The loader benchmark: generated data have the stated size, a measurement is real, the table is paired by round."""

import json
import subprocess
import sys
from pathlib import Path

import data_loading
import pytest
import synthetic_data

from prismatic.vla.datasets.rlds import RLDSReader

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    cfg = synthetic_data.SyntheticConfig(str(tmp_path_factory.mktemp("synthetic")), 100, 40, pool=4, shards=2)
    return synthetic_data.generate(cfg)


def test_generated_frames_have_the_published_size(root):
    reader = RLDSReader(root / synthetic_data.NAME / "1.0.0")
    assert [len(episode) for episode in reader] == [40, 40, 20]
    sizes = [len(frame) for frame in reader.episode(0).images["image"]]
    assert all(17_000 < size < 22_000 for size in sizes)


def test_an_existing_data_set_is_kept(root):
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*tfrecord*")}
    synthetic_data.generate(synthetic_data.SyntheticConfig(str(root), 7))
    assert before and before == {file: file.stat().st_mtime_ns for file in root.rglob("*tfrecord*")}


@pytest.mark.slow
def test_one_measurement(root):
    command = [sys.executable, str(ROOT / "benchmarks" / "data_loading.py"), "--data_root", str(root)]
    command += ["--measure_workers", "1", "--batch_size", "4", "--batches", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert (measured["samples"], measured["frames"]) == (12, 100)
    assert 0 < measured["before_gib"] < measured["peak_gib"] and measured["first_batch"] > 0


def test_ratios_are_paired_by_round_and_by_cores():
    def rounds(*seconds):
        return [{"seconds": s, "samples": 60, "first_batch": s, "peak_gib": 2.0, "frames": 9} for s in seconds]

    rows = [("ours", 1, 0, rounds(1.0, 10.0, 3.0)), ("other", 1, None, rounds(2.0, 20.0, 3.0))]
    keys = ("label", "cores", "workers", "rounds")
    content = {"batch_size": 4, "batches": 15, "shuffle_buffer": 1000, "bytes": 2**30}
    text = data_loading.report(content | {"rows": [dict(zip(keys, row, strict=True)) for row in rows]})
    assert "| ours | 1 | 20 | 2 (1-2) | 3.00 | 0.5 (0.5-1) | 2.00 | 1 (1-1) |" in text
    assert "9 frames in 1.00 GiB" in text
