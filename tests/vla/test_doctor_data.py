"""`doctor --data` reads every format that training reads, and says what training would refuse."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from format_writers import write_hdf5, write_lerobot_v21, write_lerobot_v30

from experiments.robot.doctor import __main__ as command
from experiments.robot.doctor.data_checks import data_checks
from experiments.robot.doctor.demonstrations import open_data_set, recorded_starts
from experiments.robot.doctor.findings import Status
from prismatic.vla.datasets.rlds import METADATA_FILE, write_rlds
from prismatic.vla.images import decode_jpeg

RLDS = Path(__file__).parents[2] / "datasets" / "rlds"


@pytest.fixture(scope="module")
def object_data():
    return open_data_set(RLDS / "libero_object_scripted_no_noops")


def run(checks, name):
    return next(check for check in checks if check.name == name).run()


@pytest.fixture(scope="module")
def other_formats(tmp_path_factory, object_data):
    """The shipped demonstrations, cut short, as LeRobot and HDF5 folders."""
    root = tmp_path_factory.mktemp("formats")
    episodes = [cut(object_data.reader.episode(number)) for number in range(2)]
    writers = {"v21": write_lerobot_v21, "v30": write_lerobot_v30, "hdf5": write_hdf5}
    return {name: write(root / name / "libero_object_no_noops", episodes) for name, write in writers.items()}


def cut(episode, length=60):
    numbers = {name: getattr(episode, name)[-length:] for name in ("actions", "state", "joint_state")}
    return dataclasses.replace(episode, images={k: v[-length:] for k, v in episode.images.items()}, **numbers)


@pytest.mark.parametrize("name", ["v21", "v30", "hdf5"])
def test_every_format_of_training_is_read(name, other_formats, object_data):
    data = open_data_set(other_formats[name])
    assert (data.name, data.suite, len(data)) == ("libero_object_no_noops", "libero_object", 2)
    first = cut(object_data.reader.episode(0))
    number = list(data.source.instructions).index(first.instruction)
    np.testing.assert_array_equal(data.picture(1, number, 5), decode_jpeg(first.images["wrist_image"][5]))
    assert data.statistics()["num_transitions"] == 120
    assert run(data_checks(data), "gripper of the data").status is Status.OK
    assert recorded_starts(data) == []


def test_contradictions_in_the_data_are_a_failure(tmp_path, object_data):
    episode = cut(object_data.reader.episode(0))
    episode.actions[:, 6] = (episode.actions[:, 6] < 0).astype(np.float32)
    data = open_data_set(write_lerobot_v21(tmp_path / "libero_object_no_noops", [episode]))
    finding = run(data_checks(data), "conventions of the data")
    assert finding.status is Status.FAIL and "libero_config(opens=1, closes=0)" in finding.found


def test_the_shipped_data_keep_their_conventions(object_data):
    for data in (object_data, open_data_set(RLDS / "libero_spatial_scripted_no_noops")):
        assert run(data_checks(data), "conventions of the data").status is Status.OK


@pytest.fixture(scope="module")
def collected(tmp_path_factory, object_data):
    """A version folder with a record of how it was collected."""
    folder = tmp_path_factory.mktemp("collected") / "libero_object_no_noops" / "1.0.0"
    return write_rlds(folder, "libero_object_no_noops", [object_data.reader.episode(0)], 1, (96, 96, 3), {})


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ("[]", "expected an object, found list"),
        ('{"expert": ' + "[" * 40 + "]" * 40 + "}", "nested too deeply"),
        ('{"noise_std": NaN}', "NaN"),
        ('{"seed": "x"}', "seed: found 'x', expected a whole number >= 0"),
        ('{"image_size": 1000000000}', "image_size"),
        ('{"tasks": []}', "tasks: found"),
        ('{"tasks": {"3": 5}}', "tasks: found"),
        ('{"tasks": {"x": {}}}', "tasks: found"),
        ('{"tasks": {"3": {"episodes": 30000}}, "max_attempts": 40}', "found 1200000 starts, expected at most 1000000"),
        ('{"task_suite_name": 7}', "task_suite_name: found 7, expected text"),
        ('{"render_mode": ["lazy"]}', "render_mode: found"),
        ('{"reset_mode": "gentle"}', "reset_mode: found 'gentle', expected one of hard, soft"),
    ],
)
def test_the_record_of_a_collection_is_checked_as_data(record, named, collected, capsys):
    (collected / METADATA_FILE).write_text(record)
    with pytest.raises(SystemExit) as end:
        command.main(["--data", str(collected), "--quick"])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and f"{collected / METADATA_FILE}: " in line and named in line


def test_an_unregistered_name_needs_the_file_that_registers_it(tmp_path, object_data, capsys, monkeypatch):
    folder = write_lerobot_v21(tmp_path / "my_arm", [cut(object_data.reader.episode(0))])
    with pytest.raises(SystemExit) as end:
        command.main(["--data", str(folder), "--quick"])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("doctor: error: data set 'my_arm'")
    assert "--data_set_file" in line and line.count("\n") == 1
    text = (
        "from prismatic.vla.datasets.registry import *\nregister_data_set('my_arm', get_data_set_config('libero_'))\n"
    )
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr("experiments.robot.doctor.simulator_checks.physics_checks", lambda: [])
    command.main(["--data", str(folder), "--quick", "--data_set_file", str(tmp_path / "mine.py")])
    assert "gripper of the data: mean change" in capsys.readouterr().out
