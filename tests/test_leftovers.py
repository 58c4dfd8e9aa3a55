"""What a killed writer left half done is removed at the next start; what somebody is writing stays."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from vla.data_fixtures import make_episode

from experiments.robot.libero import libero_package
from prismatic.evidence import files
from prismatic.evidence.files import remove_leftovers, replacing, write_text
from prismatic.output_folder import held
from prismatic.vla.datasets.rlds import write_rlds

ROOT = Path(__file__).parents[1]
HEAD = """
import os, signal, sys, time
from pathlib import Path
root = Path(sys.argv[1])
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
WHOLE_FILE = """
from prismatic.evidence.files import replacing
with replacing(root / "out" / "results.json") as temporary:
    temporary.write_text("{")
    die()
"""
DATA_SET = """
from vla.data_fixtures import make_episode
from prismatic.vla.datasets.rlds import write_rlds
def episodes():
    yield make_episode(0)
    die()
write_rlds(root / "d" / "1.0.0", "d", episodes(), 1, (16, 16, 3))
"""
VIDEO = """
import numpy as np
from experiments.robot.libero.video import write_video
class Frames(list):
    rounds = 0
    def __iter__(self):
        self.rounds += 1
        yield from super().__iter__()
        while self.rounds == 2 and not list(root.rglob("*.tmp")):
            time.sleep(0.01)
        if self.rounds == 2:
            die()
write_video(str(root / "videos" / "a.mp4"), Frames(np.zeros((90, 64, 64, 3), np.uint8)))
"""
CONFIGURATION = """
from experiments.robot.libero.libero_package import _private_configuration
_private_configuration(root)
die()
"""


def take(folder: Path) -> None:
    with held(folder, "--output"):
        pass


def write_data_set(root: Path) -> None:
    write_rlds(root / "d" / "1.0.0", "d", [make_episode(0)], 1, (16, 16, 3))


NEXT_START = {
    "a file in the folder of a program": (WHOLE_FILE, lambda root: take(root / "out")),
    "the only file of a program": (WHOLE_FILE, lambda root: take(root / "out" / "results.json")),
    "a file without a lock": (WHOLE_FILE, lambda root: write_text(root / "out" / "results.json", "{}")),
    "a data set": (DATA_SET, write_data_set),
    "the folder of a data set": (DATA_SET, lambda root: take(root / "d" / "1.0.0")),
    "a video": (VIDEO, lambda root: remove_leftovers(root / "videos")),
    "a configuration of LIBERO": (CONFIGURATION, lambda root: libero_package._private_configuration(None)),
}


@pytest.mark.parametrize("kind", NEXT_START)
def test_the_next_start_removes_it(kind, tmp_path, monkeypatch):
    program, start = NEXT_START[kind]
    if program is VIDEO:
        pytest.importorskip("imageio_ffmpeg")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment["TMPDIR"] = str(tmp_path)
    killed = subprocess.run([sys.executable, "-c", HEAD + program, str(tmp_path)], env=environment, check=False)
    left = list(tmp_path.rglob(".*.tmp"))
    assert killed.returncode == -signal.SIGKILL and left
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    start(tmp_path)
    assert not [path for path in left if path.exists()]


@pytest.fixture
def another_process():
    """Number of a process that lives."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        yield other.pid
        other.kill()


def test_only_what_is_nobodys_is_removed(tmp_path, another_process, dead_process):
    here = files.writer().partition("-")[0]
    names = {
        "alive": f".a.{here}-{another_process}.tmp",
        "dead": f".a.{here}-{dead_process}.tmp",
        "of another machine": f".a.00000000-{dead_process}.tmp",
        "of an earlier version": f".a.{dead_process}.tmp",
        "of an earlier version, alive": f".a.{another_process}.tmp",
        "another name": f".b.{here}-{dead_process}.tmp",
        "no temporary": f"a.{here}-{dead_process}.tmp",
        "of something else": ".a.tmp",
    }
    (tmp_path / "below").mkdir()
    for name in names.values():
        (tmp_path / name).touch()
        (tmp_path / "below" / name).touch()

    def gone() -> set[str]:
        return {kind for kind, name in names.items() if not (tmp_path / name).exists()}

    write_text(tmp_path / "a", "")
    assert gone() == {"dead"}
    remove_leftovers(tmp_path)
    assert gone() == {"dead", "another name"}
    take(tmp_path)
    assert gone() == {"dead", "another name", "of another machine", "of an earlier version"}
    assert len(list((tmp_path / "below").iterdir())) == len(names)


def test_a_link_is_not_followed(tmp_path, dead_process):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    link = tmp_path / f".a.{files.writer().partition('-')[0]}-{dead_process}.tmp"
    link.symlink_to(tmp_path / "precious")
    remove_leftovers(tmp_path)
    assert not link.is_symlink() and (tmp_path / "precious" / "file").exists()


@pytest.mark.parametrize("name", ["a[1]*?.json", "“a b”.json", "'🤖'\n$(x).json"])
def test_any_name_can_be_written_and_collected(name, tmp_path, dead_process):
    left = tmp_path / f".{name}.{files.writer().partition('-')[0]}-{dead_process}.tmp"
    left.touch()
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("x")
        assert files._TEMPORARY.fullmatch(temporary.name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
