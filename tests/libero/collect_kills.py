"""Run by test_collect_demos.py: a collection is killed at every point and begun again, and compared with a whole one.

Arguments: folder. Prints the number of kills. The simulator is replaced by made-up episodes.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from kill_points import kills

from experiments.robot.libero import collect_demos, collect_workers
from experiments.robot.libero.collect_settings import CollectSettings
from prismatic.vla.images import encode_jpeg

ROOT = Path(sys.argv[1])


class Recorder:
    """A made-up episode."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return 2

    def arrays(self) -> dict[str, np.ndarray]:
        jpegs = [encode_jpeg(self.rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), 95) for _ in range(2)]
        joined, lengths = np.frombuffer(b"".join(jpegs), np.uint8), np.array([len(jpeg) for jpeg in jpegs])
        sizes = {"actions": 7, "state": 8, "joint_state": 7}
        numbers = {name: self.rng.uniform(-1, 1, (2, size)).astype(np.float32) for name, size in sizes.items()}
        images = {camera: joined for camera in ("image", "wrist_image")}
        return numbers | images | {f"{camera}_lengths": lengths for camera in images}


class Env:
    """What a share needs of the simulator."""

    def __init__(self, task, *_args, **_options) -> None:
        self.task = task

    def close(self) -> None:
        pass


def task(suite: str, number: int) -> SimpleNamespace:
    return SimpleNamespace(suite=suite, name=f"task_{number}", task_id=number, language="go", init_states=[])


def in_this_process(settings: CollectSettings) -> None:
    for share in collect_workers.run_shares(settings):
        collect_workers.collect_share(settings, share)


def collected(kill: int) -> Path:
    return ROOT / f"killed_{kill}"


def collect(kill: int) -> None:
    settings = CollectSettings("s", (0, 1), str(collected(kill)), "mini", episodes_per_task=1, image_size=16)
    if not settings.target.exists():  # killed when all was done
        collect_demos.collect(settings)


def content(folder: Path) -> dict[str, object]:
    """Bytes of every file but locks; archives hold the time of day, so of them the name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: None if name.endswith(".npz") else path.read_bytes() for name, path in files.items()}


collect_demos.task_count = lambda _suite: 2
collect_demos.require = lambda render: None
collect_demos.simulator_versions = lambda: {}
collect_demos.run_processes = in_this_process
collect_demos.load_task = collect_workers.load_task = task
collect_workers.LiberoEnv = Env
collect_workers.collect_episode = lambda _env, _settings, start: Recorder(start.seed)
collect(0)
whole = content(collected(0))


def check(kill: int) -> None:
    found = content(collected(kill))
    assert found == whole, (kill, sorted(found.keys() ^ whole.keys()))


print(kills(collect, check))
